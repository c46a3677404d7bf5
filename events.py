"""The typed events: the one vocabulary of stream, log and spans.

`Loop.stream` yields them, the log holds them, spans are made from them, and every other view (results, tables,
exports, training examples) is a fold of them.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator

from .domain import Critique, Draft, EmotionTarget, Missing, RunStatus, StopReason

#: A content address becomes a file's name, so that nothing else may stand there.
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

#: Stands for a favourite among the labels.
FAVOURITE = "♥"

#: A word or two of a person's; a comma stands between two labels.
Label = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f,♥]{1,60}$")]

#: Raised when an event's fields change; `traces.migrate` knows the way up from older ones.
SCHEMA_VERSION = 1


class _Event(BaseModel):
    """Common head of all events.

    Attributes:
        run_id: The run.
        seq: Number within the run, from 0; given by the log when it commits, -1 before.
        cursor: Number within the log over all runs, from 1, in the order of commits; given by the log, 0 before.
        time: When it happened, UTC.
        round: The round, 0 for events that belong to the run as a whole.
        node: The graph node that wrote it.
        index: Tells several events of one node and round apart (the candidate's index).
        schema_version: `SCHEMA_VERSION` when written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    seq: int = -1
    cursor: int = Field(default=0, exclude=True)
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))
    round: int = 0
    node: str
    index: int = 0
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[str, int, str, int]:
        """Idempotency key: writing an event with a known key is a no-op."""
        return self.run_id, self.round, self.node, self.index


class RunStarted(_Event):
    """A request entered the graph. `settings` are the resolved ones, without secrets.

    `warnings` say what is to be known of the prompt before it is painted, such as words unknown to the generator.
    """

    type: Literal["run_started"] = "run_started"
    node: str = "start"
    prompt: str
    target: EmotionTarget
    seed: int
    settings: dict[str, Any] = {}
    warnings: list[str] = []


class ImageGenerated(_Event):
    """A candidate exists; the fields suffice to make it again, except for a picture from elsewhere.

    Of an imported picture `seed`, `steps` and `guidance` are None where nobody said them.
    """

    type: Literal["image_generated"] = "image_generated"
    node: str = "generate"
    sha256: Sha256
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    model: str
    revision: str | None = None
    adapter: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int
    width: int
    latents: Sha256 | None = None
    versions: dict[str, str] = {}
    seconds: float | None = None


class GenerationFailed(_Event):
    """A candidate could not be made."""

    type: Literal["generation_failed"] = "generation_failed"
    node: str = "generate"
    prompt: str
    seed: int
    reason: str


class Critiqued(_Event):
    """The critic answered, or did not: `critique` is the reading or a `Missing` with its reason."""

    type: Literal["critiqued"] = "critiqued"
    node: str = "critique"
    sha256: Sha256
    critique: Critique | Missing
    model: str
    prompt_version: str
    usage: dict[str, int] = {}
    seconds: float | None = None


class Rewarded(_Event):
    """A reward by name and version; `value` None comes with a `reason`, never as 0.

    `weight` is that of a part of a weighted sum, in a node of the part's name; the sum itself, which counts, has none.
    """

    type: Literal["rewarded"] = "rewarded"
    node: str = "reward"
    sha256: Sha256
    name: str
    version: str
    value: float | None = Field(default=None, allow_inf_nan=False)
    weight: float | None = None
    reason: str | None = None


class PersonaAnswered(_Event):
    """A persona of `mc_agent` wrote a draft for the round, or did not; `index` numbers the round's questions.

    The round's `rewritten` events follow: they hold what the director made of the drafts, and its own cost alone.
    """

    type: Literal["persona_answered"] = "persona_answered"
    node: str = "persona"
    draft: Draft
    model: str
    prompt_version: str
    usage: dict[str, int] = {}
    seconds: float | None = None


class Rewritten(_Event):
    """A prompt of the next round; `round` is the round that the prompt is for, `index` its number in it.

    In a round 0 that shows the neutral prompt, that one is number 0. Several prompts are committed together. Where one
    answer of a model gave several, the first has its tokens and seconds; `usage["calls"]` says how many answers
    a prompt took, where it was more than one. A prompt by model "human" stands in place of all others.
    """

    type: Literal["rewritten"] = "rewritten"
    node: str = "rewrite"
    prompt: str
    changes: str = ""
    why: str = ""
    model: str
    prompt_version: str
    usage: dict[str, int] = {}
    seconds: float | None = None
    warnings: list[str] = []


class HumanFeedback(_Event):
    """A person rated or marked a candidate, or commented on one or on the run.

    The last word on each axis stands; `labels` are all that the picture or the run has from then on, perhaps none.
    What tells several apart is `index`; without it the time of a rating and the words of a comment, so that
    nothing is lost and a node that runs again says a comment once.
    """

    type: Literal["human_feedback"] = "human_feedback"
    node: str = "human"
    sha256: Sha256 | None = None
    valence: float | None = None
    arousal: float | None = None
    rating: float | None = None
    favourite: bool | None = None
    labels: list[Label] | None = None
    comment: str = ""

    @model_validator(mode="before")
    @classmethod
    def _own_key(cls, data: Any) -> Any:
        # The first event of a key stands, and a corrected rating has to stand beside it.
        if not isinstance(data, dict) or "node" in data:
            return data
        data = {"time": datetime.now(UTC), **data}
        rated = any(
            data.get(axis) is not None for axis in ("valence", "arousal", "rating", "favourite", "labels")
        )
        parts = ["human", "rating" if rated else "comment", data.get("sha256")]
        if "index" not in data:
            comment = hashlib.sha256(str(data.get("comment", "")).encode()).hexdigest()[:12]
            parts.append(data["time"] if rated else comment)
        return {**data, "node": " ".join(str(part) for part in parts if part is not None)}


class RunFinished(_Event):
    """The run ended. `estimate` is the reading of a picture of the best prompt that selected nothing."""

    type: Literal["run_finished"] = "run_finished"
    node: str = "finish"
    status: RunStatus
    stop_reason: StopReason
    best: str | None = None
    best_round: int | None = None
    gain: float | None = None
    best_gain: float | None = None
    estimate: Critique | None = None
    warnings: list[str] = []


Event = Annotated[
    RunStarted
    | ImageGenerated
    | GenerationFailed
    | Critiqued
    | Rewarded
    | PersonaAnswered
    | Rewritten
    | HumanFeedback
    | RunFinished,
    Field(discriminator="type"),
]

#: Parses an event of any type from a dict or JSON.
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
