"""The templates, and what they say things with; the same for the server's pages and for a bundle on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..domain import PROTOTYPES, Emotion
from ..evals.wording import number, target_words
from .documents import RunDocument, Shot
from .jobs import CollectJob, DistillJob, EvalJob, FlowGrpoJob, JobDocument, TrainJob

HERE = Path(__file__).parent

#: Points of a curve, about.
_POINTS = 200

#: Our own and vendored scripts and style, with the licence of what is vendored.
STATIC = HERE / "static"


#: What a comparison of runs looks at, beside their settings.
_ASKED = {"prompt", "valence", "arousal", "category", "seed", "model", "adapter"}


class Links:
    """Where the server's pages lie."""

    live = True
    home = "/"

    def run(self, run_id: str) -> str:
        """A run's page."""
        return f"/runs/{quote(run_id, safe='')}"

    def shot(self, run_id: str, shot: Shot) -> str:
        """A candidate's page."""
        return f"{self.run(run_id)}/{shot.round}/{shot.index}"

    def events(self, run_id: str) -> str:
        """A run's raw events."""
        return f"/api/v1{self.run(run_id)}/events"

    def compare(self, *run_ids: str) -> str:
        """Two runs side by side."""
        return "/compare?" + "&".join(f"run={quote(run_id, safe='')}" for run_id in run_ids)

    def image(self, sha256: str) -> str:
        """A picture."""
        return f"/api/v1/images/{sha256}"

    def thumbnail(self, sha256: str, side: int = 192) -> str:
        """A small copy of it."""
        return f"/api/v1/images/{sha256}/thumbnail?side={side}"

    def static(self, name: str) -> str:
        """A script or style; its address changes when its content does."""
        return f"/static/{name}?{_stamp(name)}"


def _stamp(name: str) -> int:
    return int((STATIC / name).stat().st_mtime)


def _moment(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _ago(time: datetime) -> str:
    seconds = (datetime.now(UTC) - time).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "just now"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds >= 60:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def path(run: RunDocument) -> list[tuple[float, float, Shot]]:
    """The way of the rounds over the plane: each round's best candidate that was read."""
    found = []
    for round_ in run.rounds:
        shots = [it for proposal in round_.proposals for it in proposal.candidates if it.reading]
        if shots:
            best = max(shots, key=lambda it: -1e9 if it.reward is None else it.reward)
            assert best.reading is not None
            found.append((best.reading.valence, best.reading.arousal, best))
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@dataclass(frozen=True)
class Side:
    """What is compared: a run, or one round of it."""

    run: RunDocument
    number: int | None = None

    @property
    def name(self) -> str:
        """As an address names it."""
        return self.run.run.run_id + ("" if self.number is None else f"/{self.number}")

    @property
    def title(self) -> str:
        """As a person reads it."""
        return self.run.run.run_id + ("" if self.number is None else f", round {self.number}")

    @property
    def shown(self) -> RunDocument:
        """The run with these rounds alone."""
        rounds = [it for it in self.run.rounds if self.number in (None, it.number)]
        return self.run.model_copy(update={"rounds": rounds})

    @property
    def best(self) -> Shot | None:
        """The picture that stands for it."""
        rewarded = [it for it in self.shown.shots if it.reward is not None]
        return max(rewarded, key=lambda it: (it.best, it.reward), default=None)


def differences(*sides: Side) -> list[tuple[str, list[Any]]]:
    """In what runs or rounds differ: what they were asked for, and how the best of each was made and read."""
    about: list[dict[str, Any]] = []
    for side in sides:
        asked: dict[str, Any] = {
            "wanted": side.run.run.model_dump(mode="json", include=_ASKED),
            "settings": side.run.settings,
        }
        if best := side.best:
            read = (
                best.reading.model_dump(include={"valence", "arousal", "alignment"}) if best.reading else {}
            )
            asked |= {
                "prompt": best.prompt,
                **best.recipe,
                "reward": round(best.reward or 0.0, 3),
                "read": read,
            }
        about.append(flat(asked))
    names = dict.fromkeys(name for each in about for name in each)
    rows = [(name, [each.get(name) for each in about]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


@dataclass(frozen=True)
class Curve:
    """A figure of a training: its course between 0 and 1 on both axes, and what its ends stand for."""

    name: str
    points: list[tuple[float, float]]
    low: float
    high: float
    last: float
    step: int


def curves(metrics: Sequence[Mapping[str, float]]) -> list[Curve]:
    """The figures of a training over its steps; some hundred points each."""
    found: dict[str, list[tuple[float, float]]] = {}
    for figures in metrics:
        for name, value in figures.items():
            if name not in ("step", "look", "seconds") and math.isfinite(value):
                found.setdefault(name, []).append((figures["step"], value))
    last = max((figures["step"] for figures in metrics), default=0) or 1
    made = []
    # What is trained for first, then what watches it.
    for name in sorted(found, key=lambda it: ("/" in it, "loss" not in it and "reward" not in it)):
        course = found[name]
        thinned = course[:: -(-len(course) // _POINTS)]
        low, high = min(y for _, y in course), max(y for _, y in course)
        points = [(step / last, (value - low) / ((high - low) or 1)) for step, value in thinned]
        made.append(Curve(name, points, low, high, course[-1][1], int(course[-1][0])))
    return made


def task(job: JobDocument) -> str:
    """A job in some words."""
    match job.request.root:
        case DistillJob(objective=objective, steps=steps):
            return f"distill {objective}" + (f", {steps} steps" if steps else "")
        case EvalJob(suite=suite):
            return f"eval {suite}"
        case CollectJob(lines=lines):
            return f"collect {len(lines)} runs"
        case TrainJob(stage=stage, data=data):
            return f"train {stage} on {data}"
        case FlowGrpoJob(steps=steps):
            return "train flow-grpo" + (f", {steps} steps" if steps else "")


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "target": target_words,
        "moment": _moment,
        "ago": _ago,
        "duration": _duration,
        "task": task,
        "short": lambda value: f"{value:.3g}",
        "pretty": lambda value: json.dumps(value, indent=1, ensure_ascii=False, default=str),
    }
    made.globals |= {
        "number": number,
        "path": path,
        "emotions": list(Emotion),
        "prototypes": list(PROTOTYPES.items()),
        "links": Links(),
    }
    return made


_ENVIRONMENT = _environment()


def render(template: str, **context: Any) -> str:
    """A page, or a part of one."""
    return _ENVIRONMENT.get_template(template).render(context)
