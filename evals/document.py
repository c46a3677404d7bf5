"""The report as one JSON document: figures, and everything that one must know to believe them."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..settings import Settings, merged
from ..tools.fingerprint import versions
from ..tools.urls import public
from . import analysis
from .arms import Arm
from .judges import Judge, training
from .records import Outcome, Row
from .suites import Suite

_LIBRARIES = ("emoloop", "torch", "diffusers", "transformers", "peft", "langgraph", "numpy", "scipy")


@dataclass
class Options:
    """What the command line may change about a suite.

    Attributes:
        suite: Name or path.
        arms: Instead of the suite's.
        more_arms: Beside those.
        again: Read a suite that this release was read on before.
        judge: Headline judge instead of the suite's.
        guard: Guard instead of the suite's.
        adapters: Name → folder behind the arms NAME and `loop_on_NAME`.
        critic: Model behind the arms NAME`+critic`.
        allow_reward_judge: Let a judge that gave the reward speak, in red.
        limit: Only so many neutral prompts.
        settings: Overrides, nested by section; they win over the suite's, save for rounds and images.
    """

    suite: str
    arms: list[str] | None = None
    judge: str | None = None
    guard: str | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    critic: str | None = None
    allow_reward_judge: bool = False
    limit: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    more_arms: list[str] = field(default_factory=list)
    again: bool = False


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
    table = analysis.Table(outcome.rows, outcome.pace, suite)
    estimates = table.estimates()
    gains = table.gains()
    worth = analysis.worth(table, _whole_of(ready.arms))
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
        "figures": {
            **analysis.figures(table, {**outcome.measures, **worth}),
            **_training(ready.arms),
        },
        "arms": {
            arm.name: {
                "adapter": arm.adapter and str(arm.adapter),
                "settings": merged(arm.models, {"loop": arm.options}) if arm.options else arm.models,
                "metrics": {key: asdict(value) for key, value in estimates[arm.name].items()},
                "sweeps": table.sweeps(arm.name),
                **_losses([row for row in outcome.rows if row.arm == arm.name]),
            }
            for arm in ready.arms
        },
        "kinds": {
            kind: {arm: asdict(found) for arm, found in arms.items()} for kind, arms in table.kinds().items()
        },
        "measures": {name: asdict(found) for name, found in outcome.measures.items()},
        "gains": gains,
        "worth": {name: asdict(found) for name, found in worth.items()},
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


def _whole_of(arms: Sequence[Arm]) -> str | None:
    """The arm with all of an adapter in one pass: `whole`, else the first that is no control."""
    passes = [
        arm.name
        for arm in arms
        if arm.adapter and arm.options.get("rounds") == 1 and not arm.models["generator"].get("adapter_part")
    ]
    found = [name for name in passes if name not in (*analysis.CONTROLS, "text")]
    return "whole" if "whole" in found else next(iter(found), None)


def _training(arms: Sequence[Arm]) -> dict[str, float]:
    """`<arm>_train_minutes` of the adapters that say, and `train_minutes` of the first."""
    found: dict[str, float] = {}
    for arm in arms:
        minutes = training(arm.adapter).get("figures", {}).get("train_minutes") if arm.adapter else None
        if minutes is not None:
            found.setdefault("train_minutes", minutes)
            found[f"{arm.name}_train_minutes"] = minutes
    return found


def _losses(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "requests": len(rows),
        "delivered": sum(not row.failure for row in rows),
        "failures": dict(Counter(row.failure for row in rows if row.failure)),
        "unread": sum(reading is None for row in rows for reading in row.readings),
        "runs": [row.run_id for row in rows if row.run_id],
    }


def _command(options: Options) -> str:
    given = {flag: getattr(options, flag) for flag in ("judge", "guard", "critic", "limit")}
    given["arms"] = ",".join(options.arms or ()) or None
    words = [f"--{flag} {value}" for flag, value in given.items() if value is not None]
    words += [f"--adapter {name}={folder}" for name, folder in options.adapters.items()]
    words += [f"--arm {arm}" for arm in options.more_arms]
    words += ["--allow-reward-judge"] if options.allow_reward_judge else []
    words += ["--again"] if options.again else []
    return " ".join(["emoloop", "eval", options.suite, *words])
