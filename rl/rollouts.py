"""Rollouts: what training reads, whoever made them.

A rollout is one image that a policy made for a request, with what the critic read and the reward it got. The log
gives the rollouts of finished runs (`LogRollouts`); a sampler that makes them while training implements the same
`RolloutSource`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Select, func, select

from ..domain import Critique, Emotion, EmotionTarget, RunStatus, UserError
from ..events import EVENT, HumanFeedback
from ..tools.reward import Look, Reward, load_reward
from ..traces.rows import RunFilter
from ..traces.schema import candidates, events, runs
from ..traces.store import TraceStore


class Base(NamedTuple):
    """What made the images."""

    model: str
    revision: str | None
    adapter: str | None


class Request(NamedTuple):
    """What was asked for: one run of the loop, or one group of an online sampler."""

    run_id: str
    prompt: str
    target: EmotionTarget


class Rollout(NamedTuple):
    """One image of a request.

    Attributes:
        request: Neutral prompt and target.
        round: Round of the loop; 0 used the neutral prompt.
        index: Number of the image within the round.
        prompt: The prompt that made it.
        seed: Seed of its noise.
        sha256: Address of the image; None where none could be made.
        valence: What the critic (or a person) read.
        arousal: The same.
        alignment: How much of the neutral prompt it shows.
        category: What the critic named.
        spread: How far critics differ, on the worse axis.
        reward: Its reward, always finite; None is missing.
        rating: A person's rating.
        version: Version of the policy that made it: an adapter's hash, None for the bare model.
    """

    request: Request
    round: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    prompt: str | None
    seed: int | None
    sha256: str | None
    valence: float | None
    arousal: float | None
    alignment: float | None
    category: str | None
    spread: float | None
    reward: float | None
    rating: float | None = None
    version: str | None = None

    @property
    def critique(self) -> Critique | None:
        """The reading as rewards take it."""
        if self.valence is None or self.arousal is None:
            return None
        alignment = 1.0 if self.alignment is None else self.alignment
        category = None if self.category is None else Emotion(self.category)
        return Critique(valence=self.valence, arousal=self.arousal, category=category, alignment=alignment)


class RolloutSource(Protocol):
    """Gives rollouts; request by request, in one order for as long as the data are the same."""

    #: What made all images.
    base: Base
    #: Name and version of the reward that all carry.
    reward: tuple[str, str]

    def __iter__(self) -> Iterator[tuple[Request, list[Rollout]]]:
        """All requests with their rollouts, in order of round and index."""
        ...

    def fetch(self, run_ids: Sequence[str]) -> dict[str, list[Rollout]]:
        """The rollouts with an image of some requests."""
        ...

    def rescore(self, run_id: str) -> Reward:
        """The reward as a function, for readings or targets other than those it was given for."""
        ...

    def critics(self) -> list[str]:
        """The models whose readings the rewards come from."""
        ...


_REQUEST = (runs.c.run_id, runs.c.prompt, runs.c.valence, runs.c.arousal, runs.c.category)
#: In the order of a rollout's fields, from `round` to `reward`.
_ROLLOUT = tuple(candidates.c[name] for name in Rollout._fields[1:12])


class LogRollouts:
    """Rollouts of the finished runs that a filter picks; one stream, nothing held but one run.

    A person's reading stands above the model's: the reward is then computed again.

    Raises:
        UserError: An empty log, no run that the filter picks, no reward at all (critiques missing only), runs
            of several base models or several rewards.
    """

    def __init__(self, store: TraceStore, where: RunFilter | None = None) -> None:
        self._store, self._chosen = store, _chosen(where)
        self.base, self.reward = origin(store, where)
        self._human = _human_feedback(store, self._chosen)
        self._again: Reward | None = None

    def __iter__(self) -> Iterator[tuple[Request, list[Rollout]]]:
        """Run by run, in order of their ids."""
        return self._read(runs.c.run_id.in_(self._chosen), outer=True)

    def fetch(self, run_ids: Sequence[str]) -> dict[str, list[Rollout]]:
        """The rollouts with an image, by run."""
        mine = runs.c.run_id.in_(set(run_ids)) & candidates.c.sha256.is_not(None)
        return {request.run_id: rollouts for request, rollouts in self._read(mine)}

    def rescore(self, run_id: str) -> Reward:
        """The reward that the log names; a newcomer's own by the path in its run's settings.

        Raises:
            UserError: It is not importable from here.
        """
        if self._again is None:
            self._again = self._find_reward(run_id)
        return self._again

    def critics(self) -> list[str]:
        """The models whose readings the rewards come from, as the first critique of each run names them."""
        c = events.c
        first = select(c.body).where(
            c.run_id.in_(self._chosen), c.type == "critiqued", c.round == 0, c.index == 0
        )
        with self._store.read() as connection:
            found = connection.execution_options(yield_per=1000).scalars(first)
            return sorted({json.loads(body)["model"] for body in found})

    def _read(self, which: Any, outer: bool = False) -> Iterator[tuple[Request, list[Rollout]]]:
        joined = runs.join(candidates, runs.c.run_id == candidates.c.run_id, isouter=outer)
        query = select(*_REQUEST, *_ROLLOUT, candidates.c.adapter).select_from(joined).where(which)
        query = query.order_by(runs.c.run_id, candidates.c.round, candidates.c.index)
        with self._store.read() as connection:
            rows = map(tuple, connection.execution_options(yield_per=5000).execute(query))
            for head, mine in itertools.groupby(rows, lambda row: row[: len(_REQUEST)]):
                run_id, prompt, valence, arousal, category = head
                target = EmotionTarget(valence=valence, arousal=arousal, category=category)
                request = Request(run_id, prompt, target)
                found = (row[len(_REQUEST) :] for row in mine)
                # A run without candidates is one row of nothing.
                yield request, [self._rollout(request, row) for row in found if row[0] is not None]

    def _rollout(self, request: Request, row: Sequence[Any]) -> Rollout:
        *fields, adapter = row
        rollout = _checked(Rollout(request, *fields, version=adapter))
        said = self._human.get(request.run_id, {}).get(rollout.sha256 or "")
        if not said:
            return rollout
        rollout = rollout._replace(**said)
        if said.keys() == {"rating"} or (read := rollout.critique) is None:
            return rollout
        reward = self.rescore(request.run_id)
        picture = self._store.blobs.get_image(str(rollout.sha256)) if reward.sees else None
        value = reward.now(Look(read, request.target, request.prompt, picture))
        return _checked(rollout._replace(reward=value, spread=None))

    def _find_reward(self, run_id: str) -> Reward:
        started = select(events.c.body).where(events.c.run_id == run_id, events.c.type == "run_started")
        with self._store.read() as connection:
            body = json.loads(connection.scalar(started) or "{}")
        path = body.get("settings", {}).get("loop", {}).get("reward")
        for spec in filter(None, (self.reward[0], path)):
            with contextlib.suppress(UserError):
                found = load_reward(spec)
                if (found.name, found.version) == self.reward:
                    return found
        raise UserError(
            f"rewards of run {run_id} have to be computed again, since people read its images or data.told is "
            f"read, but reward {self.reward[0]} v{self.reward[1]} is not found by its name or by the run's "
            f"loop.reward ({path or 'not logged'}): make it importable from there, or leave the run out by --from"
        )


def fingerprint(request: Request, rollouts: Sequence[Rollout]) -> bytes:
    """All that training can see of a request besides the pixels, for hashing.

    Written as the versions before this module wrote it, so that their unfinished trainings go on.
    """
    target = request.target
    category = None if target.category is None else target.category.value
    head = repr((request.run_id, request.prompt, target.point, category))
    names = ("round", "index", "sha256", "reward", "valence", "arousal", "alignment", "spread")
    lines = [
        f"_Row({', '.join([f'{name}={getattr(it, name)!r}' for name in names])})"
        + ("" if it.rating is None else f"rating={it.rating!r}")
        for it in rollouts
    ]
    return "".join([head, *lines]).encode()


def origin(store: TraceStore, where: RunFilter | None = None) -> tuple[Base, tuple[str, str]]:
    """What made the images of the picked runs, and the name and version of their rewards.

    Raises:
        UserError: As `LogRollouts`.
    """
    c = candidates.c
    mine = c.run_id.in_(_chosen(where))
    with store.read() as connection:
        if connection.scalar(select(runs.c.run_id).limit(1)) is None:
            raise UserError(f"the log in {store.home} is empty: make runs first (`emoloop collect`)")
        counts = select(func.count(c.sha256), func.count(c.reward)).where(mine)
        images, rewarded = connection.execute(counts).one()
        if not images:
            raise UserError(
                "no finished run with images answers to --from: widen it (see `emoloop traces list`)"
            )
        if not rewarded:
            reason = connection.scalar(select(c.missing).where(mine, c.missing.is_not(None)).limit(1))
            raise UserError(
                f"none of the {images} images has a reward: all critiques are missing ({reason or 'no reason'})"
            )
        made = select(c.model, c.revision, c.adapter).where(mine, c.sha256.is_not(None)).distinct()
        bases = sorted({Base(*row) for row in connection.execute(made)}, key=_describe)
        if len(bases) > 1:
            raise UserError(
                f"the runs come from {len(bases)} base models ({_some('; ', map(_describe, bases))}): {_cure(bases)}"
            )
        named = select(c.reward_name, c.reward_version).where(mine, c.reward.is_not(None)).distinct()
        rewards = sorted((str(name), str(version)) for name, version in connection.execute(named))
        if len(rewards) > 1:
            listed = ", ".join(f"{name} v{version}" for name, version in rewards)
            raise UserError(
                f"the runs carry different rewards ({listed}): they cannot be compared; narrow --from "
                "(--from since=2026-01-31, or --from run=ID+ID)"
            )
    return bases[0], rewards[0]


def _checked(rollout: Rollout) -> Rollout:
    """With a reward that is no number as a missing one."""
    undefined = rollout.reward is not None and not math.isfinite(rollout.reward)
    return rollout._replace(reward=None) if undefined else rollout


def _chosen(where: RunFilter | None) -> Select[Any]:
    """Ids of the runs that the filter picks, as a subquery. One that still runs would change the data."""
    where = where or RunFilter()
    ids = where.apply(select(runs.c.run_id))
    return ids.where(runs.c.status != RunStatus.RUNNING) if where.status is None else ids


def _describe(base: Base) -> str:
    revision = f"@{base.revision[:8]}" if base.revision else ""
    return f"{base.model}{revision}" + (f" + adapter {base.adapter[:8]}" if base.adapter else "")


def _cure(bases: Sequence[Base]) -> str:
    """The flag that picks each of several bases."""
    by = [key for key in ("model", "adapter") if len({getattr(base, key) for base in bases}) > 1]
    if not by:
        return "they differ in revision alone: narrow by --from since=2026-01-31 or --from run=ID+ID"
    flags = set()
    for base in bases:
        values = {"model": base.model, "adapter": (base.adapter or "none")[:12]}
        flags.add("--from " + shlex.quote(",".join(f"{key}={values[key]}" for key in by)))
    return f"pick one with {_some(' or ', sorted(flags))}"


def _some(between: str, names: Iterable[str]) -> str:
    """The first few: an online training leaves a version of its policy with each collection."""
    first = list(itertools.islice(names, 5))
    return between.join([*first[:4], *(["…"] if len(first) > 4 else [])])


def _human_feedback(store: TraceStore, chosen: Select[Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What people said, by run, image and axis; the latest word on each axis stands."""
    mine = events.c.run_id.in_(chosen) & (events.c.type == "human_feedback")
    query = select(events.c.body).where(mine).order_by(events.c.run_id, events.c.seq)
    said: dict[str, dict[str, dict[str, float]]] = {}
    with store.read() as connection:
        for body in connection.execution_options(yield_per=500).scalars(query):
            event = EVENT.validate_json(body)
            assert isinstance(event, HumanFeedback)
            given = event.model_dump(include={"valence", "arousal", "rating"}, exclude_none=True)
            if event.sha256 is not None and given:
                said.setdefault(event.run_id, {}).setdefault(event.sha256, {}).update(given)
    return said
