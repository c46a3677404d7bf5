"""The words of the domain: targets, critiques, candidates, results.

Every room speaks these types and none of them imports anything heavy, so that `emoloop --help`, a trace
reader or a training job on another machine can use them without torch or LangGraph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from PIL.Image import Image

#: Both axes run from -3 to 3, EmotiCrafter's scale (arXiv 2501.05710).
LOW, HIGH = -3.0, 3.0

Score = Annotated[float, Field(ge=LOW, le=HIGH, allow_inf_nan=False)]


class Emotion(StrEnum):
    """The eight categories of Mikels et al. (2005)."""

    AMUSEMENT = "amusement"
    AWE = "awe"
    CONTENTMENT = "contentment"
    EXCITEMENT = "excitement"
    ANGER = "anger"
    DISGUST = "disgust"
    FEAR = "fear"
    SADNESS = "sadness"


#: (valence, arousal) that stands for a category when a target names only the category. The authors' own
#: placement on the circumplex, version 1: frozen, because logged targets and rewards refer to it.
PROTOTYPES: dict[Emotion, tuple[float, float]] = {
    Emotion.AMUSEMENT: (2.0, 0.8),
    Emotion.AWE: (1.2, 1.5),
    Emotion.CONTENTMENT: (1.8, -1.2),
    Emotion.EXCITEMENT: (2.2, 2.0),
    Emotion.ANGER: (-1.8, 2.0),
    Emotion.DISGUST: (-2.2, 0.6),
    Emotion.FEAR: (-1.6, 1.4),
    Emotion.SADNESS: (-1.8, -1.4),
}


class EmotionTarget(BaseModel):
    """The wanted emotion.

    Attributes:
        valence: Unpleasant (-3) to pleasant (3), or None where it does not matter.
        arousal: Calm (-3) to stirred (3), or None where it does not matter.
        category: One of the eight categories. Alone, it stands for its prototype in `PROTOTYPES`; beside
            a number, the number wins and the category is judged as well.

    Raises:
        pydantic.ValidationError: Nothing given, a number outside [-3, 3], or a number on the other side
            of zero from the category's prototype and more than 2 points away from it (a contradiction).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    valence: Score | None = None
    arousal: Score | None = None
    category: Emotion | None = None

    @model_validator(mode="after")
    def _check(self) -> EmotionTarget:
        if self.valence is None and self.arousal is None and self.category is None:
            raise ValueError("a target needs a valence, an arousal or a category")
        if self.category is not None:
            for name, value, prototype in zip(
                ("valence", "arousal"), (self.valence, self.arousal), PROTOTYPES[self.category], strict=True
            ):
                if value is not None and value * prototype < 0 and abs(value - prototype) > 2:
                    raise ValueError(
                        f"{self.category.value} has {name} {prototype:+.1f}; the target asks for {value:+.1f}: "
                        "drop one of the two"
                    )
        return self

    @property
    def point(self) -> tuple[float | None, float | None]:
        """(valence, arousal) to aim at; a category fills in only where it stands alone."""
        if self.valence is None and self.arousal is None and self.category is not None:
            return PROTOTYPES[self.category]
        return self.valence, self.arousal


class Critique(BaseModel):
    """What a critic read from one candidate.

    Attributes:
        analysis: What the critic sees, in its own words; written before the numbers.
        valence: Estimated valence in [-3, 3].
        arousal: Estimated arousal in [-3, 3].
        category: The category that the picture carries, or None where the critic names none.
        alignment: How much of the *neutral* prompt the picture shows, 0 (nothing) to 1 (all).
        suggestion: What would bring the picture nearer to the target.
        samples: How many answers were averaged.
        valence_spread: Standard deviation of valence over those answers; None for a single one.
        arousal_spread: The same for arousal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    analysis: str = ""
    valence: Score
    arousal: Score
    category: Emotion | None = None
    alignment: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    suggestion: str = ""
    samples: int = 1
    valence_spread: float | None = None
    arousal_spread: float | None = None


class Missing(BaseModel):
    """A critique or reward that could not be had: a reason, never a number.

    Attributes:
        reason: One line: what failed.
        raw: The model's answer as it came, where there was one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    raw: str | None = None


class Candidate(BaseModel):
    """One image of a round.

    Attributes:
        round: Round number, from 0.
        index: Place in the round, from 0.
        prompt: The prompt that made it.
        seed: Seed of its initial noise; None for a picture from elsewhere whose seed nobody told.
        sha256: Content address of the PNG in the blob store.
        path: Where that PNG lies; None when the candidate came without a store.
        model: Model id or folder.
        adapter: Content hash of the adapter, or None.
        critique: What the critic read, or why there is nothing.
        reward: Reward of the critique against the target; None where the critique is missing.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    index: int
    prompt: str
    seed: int | None
    sha256: str
    path: Path | None = None
    model: str = ""
    adapter: str | None = None
    critique: Critique | Missing | None = None
    reward: float | None = None

    @property
    def image(self) -> Image:
        """The picture, opened from the blob store."""
        from PIL import Image

        if self.path is None:
            raise FileNotFoundError(f"candidate {self.sha256[:12]} has no blob store behind it")
        with Image.open(self.path) as image:
            return image.convert("RGB")


class Proposal(BaseModel):
    """One prompt of a round.

    Attributes:
        prompt: The prompt.
        changes: What the rewriter changed to get there; empty for the neutral prompt.
        why: Its reason.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    changes: str = ""
    why: str = ""


class Draft(BaseModel):
    """What one persona wrote for a round (`agents.rewriters.mc_agent`).

    Attributes:
        persona: Its name.
        said: Its chain of concepts by step, from the emotion to the composition; or what its model's own format says.
        prompt: What came of it; empty where there is none.
        refused: Words that nobody can draw; their clauses are cut from the prompt.
        reason: Why the prompt cannot be used; None where it can.
    """

    model_config = ConfigDict(extra="forbid")

    persona: str
    said: dict[str, str] = {}
    prompt: str = ""
    refused: list[str] = []
    reason: str | None = None


class Round(BaseModel):
    """One generate-critique iteration.

    Attributes:
        prompt: The first prompt of this round; round 0 begins with the neutral prompt.
        changes: What the rewriter changed to get to it; empty for the neutral prompt.
        why: Its reason.
        candidates: The images, in order of index; each names the prompt that made it.
        proposals: All prompts of the round, the first one too; empty where nobody told them apart.
        final: Whether the best prompts were painted again in it, to choose among them.
        drafts: What personas wrote for it, where they did.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    changes: str = ""
    why: str = ""
    candidates: list[Candidate] = []
    proposals: list[Proposal] = []
    final: bool = False
    drafts: list[Draft] = []

    @property
    def mean_reward(self) -> float | None:
        """Mean over the candidates that have a reward; None where none has."""
        rewards = [c.reward for c in self.candidates if c.reward is not None]
        return mean(rewards)


class Example(NamedTuple):
    """A rewrite of another run that came near a target.

    Attributes:
        neutral: What that run was asked for.
        prompt: What won it.
        valence: What its picture was read as.
        arousal: The same.
    """

    neutral: str
    prompt: str
    valence: float
    arousal: float


#: Rewriters that are shown no round.
BLIND = ("one_shot", "diverse")


class RunStatus(StrEnum):
    """How a run stands.

    INTERRUPTED is said to the caller of a run that waits for a review; in the log such a run is RUNNING.
    """

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class StopReason(StrEnum):
    """Why a run ended."""

    TARGET_REACHED = "target_reached"
    NO_IMPROVEMENT = "no_improvement"
    ROUNDS_USED = "rounds_used"
    BUDGET_USED = "budget_used"
    NO_CRITIQUE = "no_critique"
    NO_REWARD = "no_reward"
    STOPPED = "stopped"
    ERROR = "error"


class RunResult(BaseModel):
    """What `loop.run` returns.

    Attributes:
        run_id: The run's name in the trace store.
        status: How it ended.
        stop_reason: Why it ended; None while it has not.
        prompt: The neutral prompt.
        target: The wanted emotion.
        best: The candidate with the highest reward over all rounds; None where nothing was rewarded.
        rounds: Every round in order.
        gain: Mean reward of the winning prompt's images minus that of the neutral prompt's.
        best_gain: Best reward minus best reward of round 0.
        estimate: What the best's prompt is read as, by a reading that selected nothing; None without finalists.
        home: Folder that holds trace and blobs.
        warnings: One line for each thing that went wrong without ending the run.
    """

    model_config = ConfigDict(extra="forbid")

    run_id: str
    status: RunStatus
    stop_reason: StopReason | None
    prompt: str
    target: EmotionTarget
    best: Candidate | None = None
    rounds: list[Round] = []
    gain: float | None = None
    best_gain: float | None = None
    estimate: Critique | None = None
    home: Path | None = None
    warnings: list[str] = []


class Failure(RuntimeError):
    """Work that could not be done although it was asked for rightly: one line (exit code 1)."""


class UserError(ValueError):
    """Wrong input or setting: one line that says what, where and how to mend it (exit code 2).

    A ValueError, because servers of graphs show the text of few others to their clients.
    """


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing, which stays missing."""
    return sum(values) / len(values) if values else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_error(error: ValidationError, whole: str = "") -> str:
    """The first thing that is wrong with a document: `section.key: why`; `whole: why` where it is no key's."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


def read_target(value: EmotionTarget | Mapping[str, Any]) -> EmotionTarget:
    """A target from what a person or a file gave; `emotion` is another name for `category`.

    Raises:
        UserError: It is none, in one line.
    """
    if isinstance(value, EmotionTarget):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"a target is valence, arousal or category, not {value!r}")
    given = {str(key): item for key, item in value.items() if item is not None}
    if "emotion" in given and "category" in given and given["emotion"] != given["category"]:
        raise UserError("emotion and category are two names for one thing: give one of them")
    if "emotion" in given:
        given["category"] = given.pop("emotion")
    if isinstance(given.get("category"), str):
        given["category"] = given["category"].strip().lower()
    try:
        return EmotionTarget.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if where in ("valence", "arousal"):
            message = f"{where} {first['input']!r}: a number from {LOW:+.0f} to {HIGH:+.0f} is wanted"
        elif where == "category":
            message = f"unknown emotion {first['input']!r}: known are {', '.join(Emotion)}"
        elif where:
            message = f"a target has no {where!r}: valence, arousal and category are known"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise UserError(message) from error
