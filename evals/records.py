"""What arms hand over and judges say: plain records that go to the cache and into the report as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..domain import Critique, Emotion, Missing
from .stats import Estimate
from .suites import Request


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Shot(_Record):
    """One image that an arm made.

    Attributes:
        sha256: Address of its PNG.
        prompt: The prompt that made it.
        seed: Seed of its noise.
        round: Round of the loop; 0 elsewhere.
        index: Place in its round.
        reward: What the critic's reading was worth to the arm, where the arm looked.
        critique: That reading.
    """

    sha256: str
    prompt: str
    seed: int
    round: int = 0
    index: int = 0
    reward: float | None = None
    critique: Critique | Missing | None = None


class Revision(_Record):
    """A rewritten prompt.

    Attributes:
        round: The round that it is for.
        prompt: The prompt.
        changes: What was changed.
        why: The rewriter's reason.
    """

    round: int
    prompt: str
    changes: str = ""
    why: str = ""


class Cost(_Record):
    """What one delivered image takes.

    Attributes:
        images: Images made for it.
        critiques: Pictures that the LVLM read.
        rewrites: Prompts that it wrote.
        samples: Answers for each picture read.
        tokens: Tokens of those answers and their prompts, where the engine counts them.
    """

    images: int = 0
    critiques: int = 0
    rewrites: int = 0
    samples: int = 1
    tokens: int | None = None


class Delivery(_Record):
    """One arm's answer to one request.

    Attributes:
        arm: The arm.
        request: `Request.id`.
        prompt: The prompt behind what was delivered.
        shots: Everything that was made.
        delivered: Places in `shots` of what the arm hands over: one image where the arm selects; several
            where it does not, and then the arm's figure is their mean.
        revisions: The prompts that were written on the way.
        run_id: The run in the evaluation's log; None where the arm failed before it began one.
        cost: For one delivered image.
        failure: Why nothing was delivered.
        complete: Whether every image that the arm asked for was made.
    """

    arm: str
    request: str
    prompt: str = ""
    shots: list[Shot] = []
    delivered: list[int] = []
    revisions: list[Revision] = []
    run_id: str | None = None
    cost: Cost = Cost()
    failure: str | None = None
    complete: bool = True

    @property
    def whole(self) -> bool:
        """Whether the arm had all that its budget allows; with less, arms don't compare."""
        valued = all(shot.critique is None or shot.reward is not None for shot in self.shots)
        return self.failure is None and self.complete and valued

    @property
    def handed_over(self) -> list[Shot]:
        """The delivered shots."""
        return [self.shots[place] for place in self.delivered]


class Reading(_Record):
    """What a judge sees in one image. None is "this judge does not say".

    Attributes:
        valence: In [-3, 3].
        arousal: In [-3, 3].
        category: One of the eight.
        subject: The thing that the picture shows, in the judge's words.
        subject_right: Whether that is what the neutral prompt names.
        alignment: How much of the neutral prompt is in the picture, 0 to 1.
        quality: CLIP-IQA, 0 to 1.
        aesthetic: Score of an aesthetic head, on the head's own scale.
        features: A description of the picture for distances.
    """

    valence: float | None = None
    arousal: float | None = None
    category: Emotion | None = None
    subject: str | None = None
    subject_right: bool | None = None
    alignment: float | None = None
    quality: float | None = None
    aesthetic: float | None = None
    features: list[float] | None = Field(default=None, repr=False)


@dataclass
class Row:
    """One arm's answer to one request, with what the judge and the guard read in it.

    Attributes:
        arm: The arm's name.
        request: The request.
        delivery: What was handed over.
        readings: The judge's reading of each image handed over; None where it could not say.
        guard: The guard's reading of each image in `siblings`.
        siblings: Images of the delivered prompt: those handed over, or where it is one, all that share its
            prompt.
    """

    arm: str
    request: Request
    delivery: Delivery
    readings: list[Reading | None] = field(default_factory=list)
    siblings: list[Shot] = field(default_factory=list)
    guard: list[Reading | None] = field(default_factory=list)

    @property
    def guard_of_delivered(self) -> list[Reading | None]:
        """The guard's readings of what was handed over."""
        by_sha = {shot.sha256: reading for shot, reading in zip(self.siblings, self.guard, strict=True)}
        return [by_sha.get(shot.sha256) for shot in self.delivery.handed_over]


@dataclass
class Outcome:
    """All rows, and what made them.

    Attributes:
        rows: Arm by arm, in the order of the suite's requests.
        blobs: Folder of the images.
        home: Folder of the evaluation's log.
        generators: `describe()` of each generator used, by adapter ("" is the base).
        identity: Weights, prompts and reward behind the figures.
        made: How many images were made now; the rest was there.
        seconds: Wall clock.
        pace: Seconds for one image, critique and rewrite, in full batches on this device.
        measures: The suite's further figures.
    """

    rows: list[Row]
    home: Path
    generators: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    made: int
    seconds: float
    pace: dict[str, float]
    measures: dict[str, Estimate] = field(default_factory=dict)
