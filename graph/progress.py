"""What a run says while it goes on: small typed messages, plain JSON on LangGraph's `custom` stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..domain import Critique, EmotionTarget, Missing, RunResult


class _Progress(BaseModel):
    model_config = ConfigDict(frozen=True)

    run_id: str


class RunBegan(_Progress):
    """The request is accepted and logged."""

    type: Literal["run_began"] = "run_began"
    prompt: str
    target: EmotionTarget
    seed: int
    rounds: int
    images: int


class RoundBegan(_Progress):
    """A round starts with its prompt."""

    type: Literal["round_began"] = "round_began"
    round: int
    prompt: str
    changes: str = ""
    why: str = ""


class ImageMade(_Progress):
    """A candidate exists."""

    type: Literal["image_made"] = "image_made"
    round: int
    index: int
    sha256: str
    seed: int


class Judged(_Progress):
    """A candidate was read, or could not be."""

    type: Literal["judged"] = "judged"
    round: int
    index: int
    critique: Critique | Missing
    reward: float | None = None


class RoundEnded(_Progress):
    """A round is complete; `best` is the best reward of the run so far."""

    type: Literal["round_ended"] = "round_ended"
    round: int
    mean_reward: float | None = None
    best_reward: float | None = None
    best: float | None = None
    judged: int = 0
    images: int = 0


class Warned(_Progress):
    """Something went wrong without ending the run."""

    type: Literal["warned"] = "warned"
    message: str


class ReviewWanted(_Progress):
    """The run waits for a person; `loop.resume(run_id, answer)` goes on.

    Attributes:
        review: round, prompt, best (sha256, reward) and the neutral prompt and target.
    """

    type: Literal["review_wanted"] = "review_wanted"
    review: dict[str, Any]


class RunEnded(_Progress):
    """The last message."""

    type: Literal["run_ended"] = "run_ended"
    result: RunResult


Progress = Annotated[
    RunBegan | RoundBegan | ImageMade | Judged | RoundEnded | Warned | ReviewWanted | RunEnded,
    Field(discriminator="type"),
]

#: Parses a message of any type from a dict.
PROGRESS: TypeAdapter[Progress] = TypeAdapter(Progress)
