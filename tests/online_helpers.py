"""Flow-GRPO on a tiny pipeline with a scripted critic, in this process or in one that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoloop.domain import EmotionTarget
from emoloop.rl.config import load_config
from emoloop.rl.distill import Distilled
from emoloop.rl.online import train
from emoloop.settings import Settings
from scripted import Scripted

QUICK = (
    "train.steps=6", "train.checkpoint_every=2", "train.batch_size=8", "train.tensorboard=false", "train.device=cpu",
    "train.lr=0.01", "train.warmup=0", "guard.every=0", "policy.rank=4", "policy.alpha=8", "policy.guidance=1.0",
    "data.held_out=0", "objective.groups=2", "objective.group=4", "objective.steps=4", "objective.early=0.75",
    "objective.clip=0.1",
)  # fmt: skip

REQUESTS = [
    (prompt, EmotionTarget(valence=valence, arousal=arousal))
    for prompt in ("a dog", "a house by the sea", "a red boat")
    for valence, arousal in ((2.0, 1.0), (-2.0, -1.0))
]


def run(settings: Settings, out: Path, *more: str, lvlm: Any = None, **how: Any) -> Distilled:
    """Train with a scripted critic in the LVLM's place."""
    loader = train.load_lvlm
    train.load_lvlm = lambda settings: lvlm or Scripted()  # type: ignore[assignment]
    try:
        config = load_config("flow-grpo", sets=[*QUICK, *more])
        return train.train_flow_grpo(settings, config, out, REQUESTS, warn=lambda note: None, **how)
    finally:
        train.load_lvlm = loader


def run_until_killed(settings: Settings, out: Path, more: list[str], number: int, resume: bool) -> None:
    """Train in a process that dies by SIGKILL when its critic is asked for the so-manieth time."""

    def fail(role: str, call: int) -> None:
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)

    run(settings, out, *more, lvlm=Scripted(fail=fail), resume=resume)


def away(first: int, calls: int, why: str = "nobody there") -> Callable[[str, int], Exception | None]:
    """A critic that answers nobody for so many calls."""
    return lambda role, number: ConnectionError(why) if first <= number < first + calls else None
