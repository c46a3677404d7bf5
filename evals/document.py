"""The report as one JSON document: figures, and everything that one must know to believe them."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import Settings
from ..tools.fingerprint import versions
from ..tools.urls import public
from . import analysis
from .records import Outcome, Row
from .suites import Suite

if TYPE_CHECKING:
    from .arms import Arm
    from .judges import Judge

_LIBRARIES = ("emoloop", "torch", "diffusers", "transformers", "peft", "langgraph", "numpy", "scipy")


@dataclass
class Options:
    """What the command line may change about a suite.

    Attributes:
        suite: Name or path.
        arms: Instead of the suite's.
        judge: Headline judge instead of the suite's.
        guard: Guard instead of the suite's.
        adapter: Folder behind the arms `adapter` and `loop_on_adapter`.
        allow_reward_judge: Let a judge that gave the reward speak, in red.
        limit: Only so many neutral prompts.
        settings: Overrides, nested by section; they win over the suite's, save for rounds and images.
    """

    suite: str
    arms: list[str] | None = None
    judge: str | None = None
    guard: str | None = None
    adapter: Path | None = None
    allow_reward_judge: bool = False
    limit: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """An evaluation that is ready to run."""

    suite: Suite
    settings: Settings
    arms: list[Arm]
    judge: Judge
    guard: Judge | None
    conflict: str | None


def describe(ready: Plan, outcome: Outcome, options: Options) -> dict[str, Any]:
    """The report as one JSON document."""
    suite = ready.suite
    table = analysis.Table(outcome.rows, outcome.pace)
    estimates = table.estimates()
    gains = table.gains()
    trained = [arm.name for arm in ready.arms if arm.adapter]
    base = outcome.generators.get("") or next(iter(outcome.generators.values()))
    asked = suite.requests
    return {
        "suite": suite.name,
        "suite_version": suite.version,
        "suite_sha256": suite.sha256,
        "about": suite.about,
        "command": _command(options),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": len(asked),
        "prompts": len({request.prompt for request in asked}),
        "images": suite.images,
        "rounds": suite.rounds,
        "seeds": {prompt: suite.seed_of(prompt) for prompt in dict.fromkeys(r.prompt for r in asked)},
        "device": base.get("device"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "judge": {"name": ready.judge.name, "version": ready.judge.version},
        "guard": ready.guard and {"name": ready.guard.name, "version": ready.guard.version},
        "reward_judge": ready.conflict,
        "figures": {**analysis.figures(table, outcome.measures), **_training(ready.arms)},
        "arms": {
            arm.name: {
                "adapter": arm.adapter and str(arm.adapter),
                "metrics": {key: asdict(value) for key, value in estimates[arm.name].items()},
                "sweeps": table.sweeps(arm.name),
                **_losses([row for row in outcome.rows if row.arm == arm.name]),
            }
            for arm in ready.arms
        },
        "measures": {name: asdict(found) for name, found in outcome.measures.items()},
        "gains": gains,
        "verdict": analysis.verdict(gains),
        "comparisons": table.comparisons(),
        "flags": analysis.flags(table, trained),
        "settings": public(ready.settings.model_dump(mode="json")),
        "versions": {**versions(*_LIBRARIES), "python": platform.python_version()},
        "generators": outcome.generators,
        "identity": outcome.identity,
        "pace": outcome.pace,
        "images_made": outcome.made,
        "wall_seconds": round(outcome.seconds, 1),
        "home": str(outcome.home),
    }


def _training(arms: Sequence[Arm]) -> dict[str, float]:
    """`<arm>_train_minutes` of the adapters that say, and `train_minutes` of the first."""
    found: dict[str, float] = {}
    for arm in arms:
        file = arm.adapter / "training.json" if arm.adapter else None
        if file and file.is_file():
            minutes = json.loads(file.read_text(encoding="utf-8")).get("figures", {}).get("train_minutes")
            if minutes is not None:
                found.setdefault("train_minutes", minutes)
                found[f"{arm.name}_train_minutes"] = minutes
    return found


def _losses(rows: Sequence[Row]) -> dict[str, Any]:
    reasons = Counter(row.delivery.failure for row in rows if row.delivery.failure)
    unread = sum(reading is None for row in rows for reading in row.readings)
    return {
        "requests": len(rows),
        "delivered": sum(not row.delivery.failure for row in rows),
        "failures": dict(reasons),
        "unread": unread,
        "runs": [row.delivery.run_id for row in rows if row.delivery.run_id],
    }


def _command(options: Options) -> str:
    words = ["emoloop", "eval", options.suite]
    for flag in ("judge", "guard", "adapter", "limit"):
        if getattr(options, flag) is not None:
            words += [f"--{flag}", str(getattr(options, flag))]
    if options.arms:
        words += ["--arms", ",".join(options.arms)]
    if options.allow_reward_judge:
        words.append("--allow-reward-judge")
    return " ".join(words)
