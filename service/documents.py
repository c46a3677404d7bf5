"""What the API gives and takes, as pydantic models; the pages show the same documents.

They are made from committed events alone (`reading`), so that a run looks the same live, later, and in a bundle.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..domain import Critique, Draft, Emotion, EmotionTarget, Missing, Score
from ..events import Event, Label, Sha256
from ..traces.rows import RunRow

#: How a run stands, as a person asks it. `waiting`: for a review. `stopped`: nobody works on it, and it can be resumed.
State = Literal["running", "waiting", "stopped", "completed", "failed"]

#: Name of a job.
JobId = Annotated[str, Field(pattern=r"^j-[0-9a-f]{20}$")]

#: Plain text of one line or several: what a person types.
Text = Annotated[str, Field(max_length=4000, pattern=r"^[^\x00]*$")]


class Document(BaseModel):
    """Common to all."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """What went wrong, after RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""


class RunSummary(RunRow):
    """One run of the list; `labels` are those of the run and of its pictures, ♥ among them for a favourite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    labels: list[str] = Field(default=[])


class RunPage(Document):
    """Runs, and where the next page begins.

    Attributes:
        items: The runs.
        next: `after` of the next page; None on the last one.
        total: How many runs the filter picks.
    """

    items: list[RunSummary]
    next: str | None
    total: int


class EventPage(Document):
    """Events of a run in the order of commits, and where the next page begins."""

    items: list[Event]
    next: int | None


class Feedback(Document):
    """What a person says of a picture, or of the run where no picture is named.

    Attributes:
        sha256: The picture.
        rating: 1 (poor) to 5 (excellent).
        valence: What the picture really makes one feel; distillation may prefer it to the critic's reading.
        arousal: The same.
        favourite: Keep it, or (false) no longer.
        labels: All that the picture, or the run, shall have from now on.
        comment: Words.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"sha256": "0" * 64, "rating": 4, "labels": ["keep"], "comment": "warm"}]
        }
    )

    sha256: Sha256 | None = None
    rating: Annotated[float, Field(ge=1, le=5)] | None = None
    valence: Score | None = None
    arousal: Score | None = None
    favourite: bool | None = None
    labels: Annotated[list[Label], Field(max_length=20)] | None = None
    comment: Text = ""


class Said(Feedback):
    """Feedback as the log holds it."""

    time: datetime


class Shot(Document):
    """A candidate: the picture with its recipe, what was read from it, and what people said.

    Attributes:
        round: Round number, from 0.
        index: Place in the round, from 0.
        prompt: The candidate's own prompt.
        sha256: The picture; None where none could be made, and `failure` says why.
        recipe: What makes the picture again: model, adapter, seed, steps, size, versions.
        critique: The critic's reading, or why there is none.
        critic: Model and prompt of the critic.
        reward: None where it is missing, and `missing` says why.
        reward_name: Name and version of the reward.
        seconds: Of making and of reading, where known.
        tokens: Of reading.
        best: Whether it is the run's best.
        feedback: In the order in which it was said.
    """

    round: int
    index: int
    prompt: str
    sha256: Sha256 | None = None
    failure: str | None = None
    recipe: dict[str, Any] = {}
    critique: Critique | Missing | None = None
    critic: str | None = None
    reward: float | None = None
    reward_name: str | None = None
    missing: str | None = None
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    best: bool = False
    feedback: list[Said] = []

    @property
    def reading(self) -> Critique | None:
        """The critique, where there is one."""
        return self.critique if isinstance(self.critique, Critique) else None

    @property
    def favourite(self) -> bool:
        """Whether the last word on it is that it is one."""
        return next((said.favourite for said in reversed(self.feedback) if said.favourite is not None), False)

    @property
    def labels(self) -> list[str]:
        """Its labels."""
        return _labels(self.feedback)

    @property
    def rating(self) -> float | None:
        """The last rating."""
        return next((said.rating for said in reversed(self.feedback) if said.rating is not None), None)


def _labels(feedback: list[Said]) -> list[str]:
    return next((said.labels for said in reversed(feedback) if said.labels is not None), [])


class Proposal(Document):
    """A prompt of a round and the candidates that were painted with it.

    Attributes:
        prompt: The prompt.
        diff: How it differs from the prompt it came from (the best of the round before): pieces of text, each kept
            ("="), added ("+") or left out ("-").
        changes: What the rewriter says it changed.
        why: Its reason.
        writer: Model or person that wrote it.
        candidates: In order of index.
    """

    prompt: str
    diff: list[tuple[Literal["=", "+", "-"], str]] = []
    changes: str = ""
    why: str = ""
    writer: str | None = None
    candidates: list[Shot] = []


class RoundDocument(Document):
    """One round: its prompts, each with its candidates, and what personas wrote for it, where they did."""

    number: int
    mean_reward: float | None
    best_reward: float | None
    proposals: list[Proposal]
    drafts: list[Draft] = []


class RunDocument(Document):
    """A run with all that is known of it.

    Attributes:
        run: As the list has it.
        rounds: In order.
        warnings: One line each.
        feedback: What was said of the run as a whole.
        settings: Those that it began with, without secrets.
        seconds: Spent on `images`, `critiques` and `rewrites`, added up; and `wall`, from beginning to end.
        tokens: `input` and `output` of the LVLM, where it says.
        cursor: Of the last event; what comes after it is new.
        cost: Of its pictures and tokens by the prices of the service's settings; none where they are not set.
        question: What a person is asked, while the run waits for a review.
        problem: Why work on it broke off here, where it did.
    """

    run: RunSummary
    rounds: list[RoundDocument]
    warnings: list[str]
    feedback: list[Said]
    settings: dict[str, Any]
    seconds: dict[str, float]
    tokens: dict[str, int]
    cursor: int
    cost: float | None = None
    question: dict[str, Any] | None = None
    problem: str | None = None

    @property
    def state(self) -> State:
        """How it stands."""
        return self.run.state

    @property
    def labels(self) -> list[str]:
        """Those of the run as a whole."""
        return _labels(self.feedback)

    @property
    def shots(self) -> list[Shot]:
        """All candidates, in order."""
        return [
            shot
            for round_ in self.rounds
            for shot in sorted(
                (it for proposal in round_.proposals for it in proposal.candidates), key=lambda it: it.index
            )
        ]

    def beside(self, place: int) -> dict[str, Shot | None]:
        """The candidates `before` and `following` one of `shots`, None at the ends."""
        shots = [None, *self.shots, None]
        return {"before": shots[place], "following": shots[place + 2]}


class RunRequest(Document):
    """What a run is asked for; what is left out is as the settings say."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a dog by the sea",
                    "target": {"valence": 2, "arousal": -1},
                    "rounds": 3,
                    "images": 4,
                }
            ]
        }
    )

    prompt: Text
    target: EmotionTarget
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    rounds: int | None = Field(default=None, ge=1, le=50)
    images: int | None = Field(default=None, ge=1, le=256)
    proposals: int | None = Field(default=None, ge=1, le=256, description="Distinct prompts in a round.")
    tolerance: float | None = Field(default=None, ge=0, le=6)
    patience: int | None = Field(default=None, ge=1, le=50)
    max_images: int | None = Field(default=None, ge=1, le=100_000)
    max_calls: int | None = Field(default=None, ge=1, le=1_000_000)
    max_seconds: float | None = Field(default=None, gt=0, le=1_000_000)
    review: bool | None = Field(default=None, description="Wait for a person before each rewrite.")


class Answer(Document):
    """A person's answer to a review; an empty one lets the rewriter go on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"comment": "more light"}]})

    prompt: Text | None = Field(
        default=None, description="The next round's prompt, instead of the rewriter's."
    )
    comment: Text = Field(default="", description="For the rewriter.")
    stop: bool = Field(default=False, description="End the run here.")


class Play(Document):
    """What the playground is asked for.

    Attributes:
        prompt: The neutral prompt.
        target: The wanted emotion.
        scale: Strength of the adapter: 0 is the base model.
        adapter: A finished training (a job) whose artifact answers; by default the server's own adapter.
        beside: Another one, which answers in place of the base.
        seed: Of both pictures' noise.
        read: Have the critic read both.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a dog by the sea", "target": {"valence": 2, "arousal": -1}, "scale": 1.0}
            ]
        }
    )

    prompt: Text
    target: EmotionTarget
    scale: float = Field(default=1.0, ge=0, le=2)
    adapter: JobId | None = None
    beside: JobId | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    read: bool = True


class Played(Document):
    """One pass of a model: the picture as a data URI, what it took, and what the critic read.

    `base` is the bare model, `distilled` the adapter that was asked, `other` the one that was to stand beside it.
    """

    name: Literal["base", "distilled", "other"]
    image: str
    seconds: float | None = None
    reading: Critique | Missing | None = None


class Again(Document):
    """A picture that was made again.

    Attributes:
        image: It, as a data URI.
        same: Whether all pixels agree with the first one's.
        difference: Largest difference of a channel, 0 to 255; None where the sizes differ.
        pixels: Share of pixels that differ.
        changed: What is another now than then: model, adapter, sampling, versions of libraries.
        seconds: What it took.
    """

    image: str
    same: bool
    difference: int | None
    pixels: float
    changed: list[str]
    seconds: float


class Listing(Document):
    """Which runs, and in which order."""

    q: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] = Field(
        default="", description="Words of the prompt, or the beginning of a run id."
    )
    state: Literal["running", "stopped", "completed", "failed"] | None = Field(
        default=None, description="`stopped` has those that wait for a review as well."
    )
    category: Emotion | None = None
    model: Annotated[str, Field(max_length=500, pattern=r"^[^\x00]*$")] | None = None
    adapter: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-z]*$")] | None = Field(
        default=None, description='Content hash, or its beginning; "none" is the bare model.'
    )
    label: Annotated[str, Field(max_length=60, pattern=r"^[^\x00]*$")] | None = Field(
        default=None, description="Of the run or one of its pictures; ♥ has the favourites."
    )
    min_gain: float | None = Field(default=None, allow_inf_nan=False)
    sort: Literal["newest", "oldest", "reward", "gain", "updated"] = "newest"
    after: Annotated[str, Field(max_length=400, pattern=r"^[\w=-]*$")] = Field(
        default="", description="`next` of the page before."
    )
    limit: int = Field(default=50, ge=1, le=200)
