"""What arms hand over and judges say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..domain import Candidate, Emotion, RunResult
from .stats import Estimate
from .suites import Request


class Reading(BaseModel):
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
        preference: Which picture people would choose for the prompt, on the scorer's own scale.
        features: A description of the picture for distances.
    """

    model_config = ConfigDict(extra="forbid")

    valence: float | None = None
    arousal: float | None = None
    category: Emotion | None = None
    subject: str | None = None
    subject_right: bool | None = None
    alignment: float | None = None
    quality: float | None = None
    aesthetic: float | None = None
    preference: float | None = None
    features: list[float] | None = Field(default=None, repr=False)


@dataclass(frozen=True)
class Cost:
    """What one image handed over takes.

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


@dataclass
class Row:
    """One arm's answer to one request, with what the judge and the guard read in it.

    Attributes:
        arm: The arm's name.
        request: The request.
        run: The run in the evaluation's log; None where the arm failed before it began one.
        handed_over: One image where the arm selects; all that it made where it does not, and then the arm's
            figure is their mean.
        cost: For one of these.
        failure: Why nothing was handed over.
        readings: The judge's reading of each image handed over; None where it could not say.
        guard: The guard's reading of each image in `siblings`.
    """

    arm: str
    request: Request
    run: RunResult | None = None
    handed_over: list[Candidate] = field(default_factory=list)
    cost: Cost = Cost()
    failure: str | None = None
    readings: list[Reading | None] = field(default_factory=list)
    guard: list[Reading | None] = field(default_factory=list)

    @property
    def run_id(self) -> str | None:
        """The run's name in the evaluation's log."""
        return self.run and self.run.run_id

    @property
    def made(self) -> list[Candidate]:
        """Every image of the run, in order."""
        return [
            candidate for round in (self.run.rounds if self.run else ()) for candidate in round.candidates
        ]

    @property
    def prompt(self) -> str:
        """The prompt behind what was handed over; the neutral one where that is nothing."""
        return self.handed_over[0].prompt if self.handed_over else self.request.prompt

    @property
    def siblings(self) -> list[Candidate]:
        """What was handed over or, where that is one image, all that share its prompt."""
        if len(self.handed_over) != 1:
            return self.handed_over
        return [candidate for candidate in self.made if candidate.prompt == self.prompt]

    @property
    def guard_of_delivered(self) -> list[Reading | None]:
        """The guard's readings of what was handed over."""
        by_sha = {one.sha256: reading for one, reading in zip(self.siblings, self.guard, strict=True)}
        return [by_sha.get(one.sha256) for one in self.handed_over]


@dataclass
class Outcome:
    """All rows, and what made them.

    Attributes:
        rows: Arm by arm, in the order of the suite's requests.
        home: Folder of the evaluation's log.
        generators: `describe()` of each generator used, by what its arms set ("" is the base).
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
