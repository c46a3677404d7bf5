"""What the store gives back: rows of runs and candidates, and the filter that picks runs."""

from __future__ import annotations

from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict
from sqlalchemy import ColumnElement, Select, select

from ..domain import Emotion, EmotionTarget, RunStatus, StopReason
from .schema import labels, runs


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunRow(_Row):
    """One line of the list of runs; `point_*` is where a category alone aims (`EmotionTarget.point`)."""

    run_id: str
    status: RunStatus
    stop_reason: StopReason | None
    started: AwareDatetime
    updated: AwareDatetime
    finished: AwareDatetime | None
    prompt: str
    prompt_hash: str
    seed: int
    valence: float | None
    arousal: float | None
    category: Emotion | None
    point_valence: float | None
    point_arousal: float | None
    model: str | None
    adapter: str | None
    events: int
    rounds: int
    images: int
    missing: int
    best_round: int | None
    best_index: int | None
    best_sha256: str | None
    best_prompt: str | None
    best_reward: float | None
    gain: float | None
    best_gain: float | None

    @property
    def target(self) -> EmotionTarget:
        """The wanted emotion, as it was asked for."""
        return EmotionTarget(valence=self.valence, arousal=self.arousal, category=self.category)


class CandidateRow(_Row):
    """One candidate; `sha256` None where no image could be made, `missing` says why there is no reward."""

    run_id: str
    round: int
    index: int
    prompt: str | None
    prompt_hash: str | None
    negative_prompt: str | None
    seed: int | None
    sha256: str | None
    latents: str | None
    model: str | None
    revision: str | None
    adapter: str | None
    steps: int | None
    guidance: float | None
    height: int | None
    width: int | None
    valence: float | None
    arousal: float | None
    category: Emotion | None
    alignment: float | None
    spread: float | None
    reward: float | None
    reward_name: str | None
    reward_version: str | None
    missing: str | None


class RunFilter(BaseModel):
    """Which runs; all conditions hold together.

    Attributes:
        run_ids: Only these.
        status: How they stand.
        category: Wanted category.
        valence: Range of the wanted valence (a category alone counts with its prototype), both ends included.
        arousal: The same for arousal.
        min_gain: At least this gain.
        prompt: Substring of the neutral prompt, in any case.
        model: Model id or folder.
        adapter: Content hash of the adapter that made the images, or its beginning; "none" is the bare model.
        label: The run or one of its pictures has this label; ♥ is that of favourites.
        since: Started at or after.
        limit: At most so many, the newest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_ids: tuple[str, ...] | None = None
    status: RunStatus | None = None
    category: Emotion | None = None
    valence: tuple[float, float] | None = None
    arousal: tuple[float, float] | None = None
    min_gain: float | None = None
    prompt: str | None = None
    model: str | None = None
    adapter: str | None = None
    label: str | None = None
    since: AwareDatetime | None = None
    limit: int | None = None

    def apply(self, query: Select[Any]) -> Select[Any]:
        """Narrow a query over `runs`."""
        conditions = [
            None if self.run_ids is None else runs.c.run_id.in_(self.run_ids),
            None if self.status is None else runs.c.status == self.status,
            None if self.category is None else runs.c.category == self.category,
            None if self.valence is None else runs.c.point_valence.between(*self.valence),
            None if self.arousal is None else runs.c.point_arousal.between(*self.arousal),
            None if self.min_gain is None else runs.c.gain >= self.min_gain,
            None if self.prompt is None else runs.c.prompt.icontains(self.prompt, autoescape=True),
            None if self.model is None else runs.c.model == self.model,
            self._adapter(),
            self._labelled(),
            None if self.since is None else runs.c.started >= self.since,
        ]
        query = query.where(*[condition for condition in conditions if condition is not None])
        query = query.order_by(runs.c.started.desc(), runs.c.run_id.desc())
        return query if self.limit is None else query.limit(self.limit)

    def _adapter(self) -> ColumnElement[bool] | None:
        if self.adapter is None:
            return None
        if self.adapter == "none":
            return runs.c.adapter.is_(None)
        return runs.c.adapter.startswith(self.adapter, autoescape=True)

    def _labelled(self) -> ColumnElement[bool] | None:
        if self.label is None:
            return None
        return runs.c.run_id.in_(select(labels.c.run_id).where(labels.c.label == self.label))
