"""Objectives and guards that misbehave on purpose, named by dotted path in tests of distillation."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.rl.objectives.opd import OPD
from emoloop.rl.objectives.sft import SFT
from emoloop.settings import Settings
from PIL import Image


def distil_until_killed(settings: Settings, objective: str, sets: list[str], out: Path, at: int) -> None:
    """Distil in a process of its own that dies by SIGKILL at a step; resumes what an earlier one left."""

    def watch(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    distill(settings, load_config(objective, sets=sets), out, resume=at > 1, watch=watch)


class TurnsToNaN(SFT):
    """Works for a while, then divides nothing by nothing."""

    after: int = 3
    calls: ClassVar[list[int]] = [0]

    def loss(self, batch: Any, policy: Any, generator: torch.Generator) -> Any:
        loss, figures = super().loss(batch, policy, generator)
        if torch.is_grad_enabled():
            self.calls[0] += 1
            if self.calls[0] > self.after:
                loss = loss * torch.nan
        return loss, figures


class WatchesSlow(OPD):
    """On-policy distillation that also says how far the slow average is from the student."""

    def slow_decay(self, step: int) -> float:
        return 0.9

    def loss(self, batch: Any, policy: Any, generator: torch.Generator) -> Any:
        loss, figures = super().loss(batch, policy, generator)
        slow, own = policy.slow_state(), policy.parameters()
        drift = max(float((own[name].detach() - value).abs().max()) for name, value in slow.items())
        return loss, {**figures, "drift": drift}


class BadGradient(SFT):
    """A loss that is a number and has a gradient that is none: the slope of a root at 0."""

    def loss(self, batch: Any, policy: Any, generator: torch.Generator) -> Any:
        loss, figures = super().loss(batch, policy, generator)
        return loss + (loss - loss).sqrt(), figures


class Collapsing:
    """A guard whose reward rises and whose alignment falls at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def read(self, images: list[Image.Image]) -> list[Any]:
        self.looks += 1
        # Two looks at the yardsticks, then the student.
        nearness = min(1.0, 0.1 * max(0, self.looks - 2))
        off = 30 * (1 - nearness)
        features = np.random.default_rng(0).standard_normal((len(images), 4))
        return [
            SimpleNamespace(valence=off, arousal=off, features=row, index=i) for i, row in enumerate(features)
        ]

    def alignment(self, image: Image.Image, prompt: str) -> float:
        return 1.0 if self.looks <= 3 else 0.1


class Brightness:
    """A recogniser that feels light: brighter is of higher valence, redder of higher arousal."""

    def read(self, images: list[Image.Image]) -> list[Any]:
        means = [np.asarray(image, dtype=float).mean((0, 1)) / 255 for image in images]
        return [
            SimpleNamespace(valence=6 * m.mean() - 3, arousal=6 * (m[0] - m[2]), features=m, index=i)
            for i, m in enumerate(means)
        ]

    def alignment(self, image: Image.Image, prompt: str) -> float:
        return 1.0
