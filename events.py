"""What gets written down: the typed events and the recorder that rooms are handed.

The events are the contract between the graph, which writes them, and everything that reads a log later:
the viewer, the exports, the distillation. Rooms receive a `Recorder` and never know what stands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from .domain import Critique, EmotionTarget, Missing, RunStatus, StopReason

if TYPE_CHECKING:
    from PIL.Image import Image

#: Raised when an event's fields change; `traces.migrate` knows the way up from older ones.
SCHEMA_VERSION = 1


class _Event(BaseModel):
    """Common head of all events.

    Attributes:
        run_id: The run.
        seq: Place in the run, from 0; given by the log when it commits, -1 before.
        time: When it happened, UTC.
        round: The round, 0 for events that belong to the run as a whole.
        node: The graph node that wrote it.
        index: Tells several events of one node and round apart (the candidate's index).
        schema_version: `SCHEMA_VERSION` when written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    seq: int = -1
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
    """A request entered the graph. `settings` are the resolved ones, without secrets."""

    type: Literal["run_started"] = "run_started"
    node: str = "start"
    prompt: str
    target: EmotionTarget
    seed: int
    settings: dict[str, Any] = {}


class ImageGenerated(_Event):
    """A candidate exists; the fields suffice to make it again."""

    type: Literal["image_generated"] = "image_generated"
    node: str = "generate"
    sha256: str
    prompt: str
    negative_prompt: str | None = None
    seed: int
    model: str
    revision: str | None = None
    adapter: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int
    width: int
    latents: str | None = None
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
    sha256: str
    critique: Critique | Missing
    model: str
    prompt_version: str
    usage: dict[str, int] = {}
    seconds: float | None = None


class Rewarded(_Event):
    """A reward by name and version; `value` None comes with a `reason`, never as 0."""

    type: Literal["rewarded"] = "rewarded"
    node: str = "reward"
    sha256: str
    name: str
    version: str
    value: float | None = Field(default=None, allow_inf_nan=False)
    reason: str | None = None


class Rewritten(_Event):
    """The prompt of the next round; `round` is the round that the prompt is for."""

    type: Literal["rewritten"] = "rewritten"
    node: str = "rewrite"
    prompt: str
    changes: str = ""
    why: str = ""
    model: str
    prompt_version: str
    usage: dict[str, int] = {}
    seconds: float | None = None


class HumanFeedback(_Event):
    """A person rated a candidate or edited a prompt; `index` numbers the ratings of one picture, else time does."""

    type: Literal["human_feedback"] = "human_feedback"
    node: str = "human"
    sha256: str | None = None
    valence: float | None = None
    arousal: float | None = None
    rating: float | None = None
    comment: str = ""

    @model_validator(mode="before")
    @classmethod
    def _own_key(cls, data: Any) -> Any:
        # The first event of a key stands, and a corrected rating has to stand beside it.
        if not isinstance(data, dict) or "node" in data or data.get("sha256") is None:
            return data
        data = {"time": datetime.now(UTC), **data}
        rated = any(data.get(axis) is not None for axis in ("valence", "arousal", "rating"))
        number = f" {data['time']}" if rated and "index" not in data else ""
        return {**data, "node": f"human {'rating' if rated else 'comment'} {data['sha256']}{number}"}


class RunFinished(_Event):
    """The run ended."""

    type: Literal["run_finished"] = "run_finished"
    node: str = "finish"
    status: RunStatus
    stop_reason: StopReason
    best: str | None = None
    best_round: int | None = None
    gain: float | None = None
    best_gain: float | None = None
    warnings: list[str] = []


Event = Annotated[
    RunStarted
    | ImageGenerated
    | GenerationFailed
    | Critiqued
    | Rewarded
    | Rewritten
    | HumanFeedback
    | RunFinished,
    Field(discriminator="type"),
]

#: Parses an event of any type from a dict or JSON.
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class Span(Protocol):
    """The part of an OpenTelemetry span that rooms use."""

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes."""
        ...


class Recorder(Protocol):
    """What nodes write to. One recorder serves many concurrent runs."""

    async def record(self, *events: Event) -> None:
        """Commit events in one transaction; return only when they are durable. Known keys are skipped."""
        ...

    async def put_image(self, image: Image) -> str:
        """Store an image as PNG and return its SHA-256; the same pixels give the same address."""
        ...

    async def get_image(self, sha256: str) -> Image:
        """The stored image, RGB."""
        ...

    async def events(self, run_id: str) -> list[Event]:
        """The run's events in order of `seq`."""
        ...

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Span]:
        """A `gen_ai.*` span around the block; costs next to nothing when tracing is off."""
        ...
