"""Suites: which requests are judged, frozen in a YAML file.

A suite is neutral prompts × targets × seeds and the arms and judge that go with them. It is versioned and
content-hashed, because a figure means nothing without the requests behind it: a changed suite is a new
version.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..domain import Emotion, EmotionTarget, Score, UserError, first_error
from ..settings import read_yaml

Words = Annotated[str, Field(min_length=1, max_length=2000)]
Prompts = Annotated[list[Words], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(_Part):
    """Every pair of the two lists."""

    valence: list[Score] = Field(min_length=1)
    arousal: list[Score] = Field(min_length=1)


class Sweep(_Part):
    """One axis runs while the other stands still (or is left open, with None)."""

    axis: Literal["valence", "arousal"]
    values: list[Score] = Field(min_length=3)
    other: Score | None = 0.0


class Block(_Part):
    """Prompts × targets; targets come as a list, a grid, sweeps, or all of them.

    Attributes:
        prompts: Neutral prompts, or such lists by kind. The n-th `paraphrase` says what the n-th `place` says.
        targets: Targets as `{valence, arousal, category}`.
        grid: A grid of (valence, arousal).
        sweeps: Sweeps of one axis.
    """

    prompts: Prompts | Annotated[dict[str, Prompts], Field(min_length=1)]
    targets: list[EmotionTarget] = []
    grid: Grid | None = None
    sweeps: list[Sweep] = []

    @model_validator(mode="after")
    def _not_empty(self) -> Block:
        if not self.points:
            raise ValueError("a block needs targets, a grid or sweeps")
        return self

    @property
    def kinds(self) -> dict[str, str]:
        """Each prompt's kind; empty where the suite names none."""
        by_kind = self.prompts if isinstance(self.prompts, dict) else {"": self.prompts}
        return {prompt: kind for kind, prompts in by_kind.items() for prompt in prompts}

    @property
    def points(self) -> list[EmotionTarget]:
        """All targets of the block, without repeats, in the order given."""
        points = list(self.targets)
        if self.grid:
            points += [
                EmotionTarget(valence=v, arousal=a) for v, a in product(self.grid.valence, self.grid.arousal)
            ]
        for sweep in self.sweeps:
            other = "arousal" if sweep.axis == "valence" else "valence"
            points += [EmotionTarget(**{sweep.axis: value, other: sweep.other}) for value in sweep.values]
        return list(dict.fromkeys(points))


class Request(_Part):
    """One neutral prompt and what its picture shall make people feel."""

    prompt: Words
    target: EmotionTarget

    @cached_property
    def id(self) -> str:
        """Short content address, the same in every suite."""
        text = json.dumps([self.prompt, self.target.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Suite(_Part):
    """A frozen set of requests with the arms and the judge that belong to it.

    Attributes:
        name: What `emoloop eval NAME` calls it.
        version: Raised whenever a request, a seed or a budget changes.
        about: One or two sentences for the report.
        seed: From it and the neutral prompt come all seeds of a request.
        images: Images in a round, and images over which an arm that does not select is averaged.
        rounds: Rounds of the loop; selecting arms get `rounds × images` images.
        arms: Arms by name, in the order of the report.
        adapters: Further arms: name → distilled artifact (path from the suite's file, or absolute).
        cross: Whether each adapter is also an arm under the loop, and each loop also one with `--critic`'s model.
        judge: Headline judge: a name in the registry or a dotted path.
        guard: Second reader for alignment, diversity and smoothness; likewise.
        ledger: Where each reading is recorded (path from the suite's file, or absolute); a release is read once.
        measures: Further figures: dotted path of an async function `(kit, rows, pace) -> {name: Estimate}`.
        settings: Overrides of emoloop's settings that belong to the suite, nested by section.
        blocks: The requests.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    version: Annotated[int, Field(ge=1)]
    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    images: Annotated[int, Field(ge=1, le=256)] = 8
    rounds: Annotated[int, Field(ge=1, le=50)] = 3
    arms: list[str] = Field(min_length=1)
    adapters: dict[str, Path] = {}
    cross: bool = False
    judge: str | None = None
    guard: str | None = None
    ledger: Path | None = None
    measures: str | None = None
    settings: dict[str, dict[str, Any]] = {}
    blocks: list[Block] = Field(min_length=1)

    @field_validator("arms")
    @classmethod
    def _once(cls, arms: list[str]) -> list[str]:
        if len(set(arms)) != len(arms):
            raise ValueError("an arm is named twice")
        return arms

    @cached_property
    def requests(self) -> list[Request]:
        """Every request once, in the order of the file."""
        return list(
            dict.fromkeys(
                Request(prompt=prompt, target=target)
                for block in self.blocks
                for prompt in block.kinds
                for target in block.points
            )
        )

    @cached_property
    def sha256(self) -> str:
        """Content hash of what decides the figures: everything but the words about it."""
        words = {"about", "arms", "adapters", "cross", "ledger", "measures"}
        kept = self.model_dump(mode="json", exclude=words)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Neutral prompt → its kind; empty where it has none."""
        return {prompt: kind for block in self.blocks for prompt, kind in block.kinds.items()}

    @cached_property
    def restated(self) -> dict[str, str]:
        """Each paraphrase and the plain prompt that it says in other words, where its block has both."""
        blocks = (block.prompts for block in self.blocks if isinstance(block.prompts, dict))
        pairs = (zip(block.get("paraphrase", ()), block.get("place", ()), strict=False) for block in blocks)
        return dict(chain.from_iterable(pairs))

    @cached_property
    def declared(self) -> dict[tuple[str, str, float | None, Emotion | None], set[float]]:
        """The values of each sweep that the suite declares: by axis, prompt, the other axis, no category."""
        return {
            (sweep.axis, prompt, sweep.other, None): set(sweep.values)
            for block in self.blocks
            for sweep in block.sweeps
            for prompt in block.kinds
        }

    @property
    def budget(self) -> int:
        """Images that an arm that selects may make."""
        return self.rounds * self.images

    def limited(self, count: int) -> Suite:
        """The suite with its first so many neutral prompts."""
        kept = list(dict.fromkeys(request.prompt for request in self.requests))[:count]
        blocks = []
        for block in self.blocks:
            prompts: dict[str, list[str]] = {}
            for prompt, kind in block.kinds.items():
                if prompt in kept:
                    prompts.setdefault(kind, []).append(prompt)
            if prompts:
                blocks.append({**block.model_dump(), "prompts": prompts.get("", prompts)})
        return Suite.model_validate({**self.model_dump(), "blocks": blocks})

    def seed_of(self, prompt: str) -> int:
        """The run seed of a neutral prompt: its targets share it, other prompts have their own.

        Sharing makes a sweep's images comparable and lets arms that ignore the target make their images once.
        """
        return int.from_bytes(hashlib.sha256(f"{self.seed}\n{prompt}".encode()).digest()[:4], "big") >> 1


#: Where the shipped suites lie.
FOLDER = Path(__file__).parent / "suites"


def shipped() -> list[str]:
    """Names of the suites that come with emoloop."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_suite(name: str | Path) -> Suite:
    """Read a suite.

    Args:
        name: A shipped name ("loop") or the path of a YAML file.

    Raises:
        UserError: Unknown name, unreadable file or a field that does not fit, in one line that names it.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in shipped() else Path(name)
    if not path.is_file():
        raise UserError(f"no suite {str(name)!r}: neither one of {', '.join(shipped())} nor a YAML file")
    try:
        told = read_yaml(path)
        if other := told.pop("requests_of", None):
            # The other suite's seeds and budget too: its runs are then found in the log.
            told = load_suite(other).model_dump(include={"blocks", "seed", "images", "rounds"}) | told
        suite = Suite.model_validate(told)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error, 'suite')}") from error
    adapters = {arm: (path.parent / folder).resolve() for arm, folder in suite.adapters.items()}
    ledger = suite.ledger and (path.parent / suite.ledger).resolve()
    return suite.model_copy(update={"adapters": adapters, "ledger": ledger})
