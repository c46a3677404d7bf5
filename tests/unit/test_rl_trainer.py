"""What the trainer takes from libraries, against the closed forms of what it replaced."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from emoloop.rl.config import load_config
from emoloop.rl.trainer import Trainer


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 10), (12, 10)])
def test_the_rate_of_each_step(schedule: str, warmup: int, steps: int) -> None:
    sets = [f"train.schedule={schedule}", f"train.warmup={warmup}", f"train.steps={steps}"]
    config = load_config("sft", sets=[*sets, "train.lr=0.5", "train.emotion_lr=0.25"])
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("denoiser.a", "tokens.b")}
    trainer: Any = SimpleNamespace(config=config, policy=SimpleNamespace(parameters=lambda: weights))
    trainer._optimizer = Trainer._make_optimizer(trainer)
    for step in range(steps):
        factor = min(1.0, (step + 1) / (warmup + 1))
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        if schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * progress))
        elif schedule == "linear":
            factor *= 1 - progress
        assert Trainer._set_rates(trainer, step) == pytest.approx(0.5 * factor)
        rates = [group["lr"] for group in trainer._optimizer.param_groups]
        assert rates == pytest.approx([0.5 * factor, 0.25 * factor])


def test_the_average_of_the_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average, expected = EMAModel([weight], decay=0.9), 1.0
    for step in range(200):
        weight.data += 0.1 * (step % 7)
        average.step([weight])
        # Ours had 0.1 at step 0: a tenth of the start for one step.
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * weight.item()
        assert average.shadow_params[0].item() == pytest.approx(expected, rel=1e-5)
