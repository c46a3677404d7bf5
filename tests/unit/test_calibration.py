"""The calibrated dial: against hand-made curves, and what emotion tokens hear through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emoloop.emotion import UserError
from emoloop.rl.calibration import calibrate, inverse
from emoloop.rl.config import CalibrationConfig, DistillConfig
from emoloop.rl.distill import _reader
from emoloop.rl.networks import Conditioning
from emoloop.tools.emotion_tokens import EmotionTokens
from emoloop.tools.families import Embeds

KNOTS = np.array([-3.0, -1.5, 0.0, 1.5, 3.0])


def test_inverse_of_a_dial_that_goes_half_the_way() -> None:
    assert inverse(KNOTS, 0.5 * KNOTS) == pytest.approx([-3, -3, 0, 3, 3], abs=1e-4)
    assert inverse(KNOTS, KNOTS) == pytest.approx(KNOTS, abs=1e-4)


def test_inverse_of_a_noisy_dial_rises() -> None:
    heard = inverse(KNOTS, np.array([-2.0, -0.5, -0.9, 1.0, 2.5]))
    assert (np.diff(heard) >= 0).all()
    assert heard.min() >= -3 and heard.max() <= 3


class FakePolicy:
    """Its images are what it was told, put through a dial that is too weak and off centre."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tokens = EmotionTokens(6, 4)

    def sample(self, told: Any, target: torch.Tensor, seeds: list[int]) -> list[Any]:
        assert len(told) == len(target) == len(seeds)
        return [
            SimpleNamespace(valence=0.6 * v - 0.3, arousal=0.8 * a)
            for v, a in self.tokens._hear(target).tolist()
        ]


def test_a_calibrated_dial_reads_as_asked() -> None:
    policy: Any = FakePolicy()
    cache: Any = SimpleNamespace(embeds=lambda prompts: Conditioning(torch.zeros(len(prompts), 2, 6)))
    reader: Any = SimpleNamespace(read=lambda images: images)
    # Twice: it starts from a straight dial, so what an earlier calibration said is not counted again.
    for _ in range(2):
        report = calibrate(policy, cache, reader, ["a", "b", "a"], CalibrationConfig(prompts=2, knots=7))
    asked = torch.tensor([[1.0, -2.0], [-1.0, 2.0], [0.0, 0.0]])
    read = policy.sample(asked, asked, [0, 0, 0])
    assert [(it.valence, it.arousal) for it in read] == [
        pytest.approx(pair, abs=1e-3) for pair in asked.tolist()
    ]
    assert report["asked"] == [-3, -2, -1, 0, 1, 2, 3]
    assert report["valence_read"] == pytest.approx([0.6 * x - 0.3 for x in report["asked"]], abs=1e-3)


def test_tokens_hear_through_the_dial_and_keep_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    tokens = EmotionTokens(6, 4, rank=3)
    torch.nn.init.normal_(tokens.up.weight)
    embeds = Embeds(torch.randn(2, 5, 6), torch.randn(2, 4))
    plain = tokens(embeds, torch.tensor([[2.0, 0.0], [torch.nan, -1.0]]))
    tokens.calibrate(torch.tensor([[-3.0, 0.0, 3.0], [-3.0, -1.0, 1.0]]))
    # Arousal 1.5 lies half-way between what is heard for 0 (-1) and for 3 (1).
    through = tokens(embeds, torch.tensor([[2.0, 1.5], [torch.nan, 0.0]]))
    assert torch.allclose(plain.prompt, through.prompt, atol=1e-6)
    tokens.save(tmp_path / "tokens.safetensors")
    loaded = EmotionTokens.load(tmp_path / "tokens.safetensors")
    again = loaded(embeds, torch.tensor([[2.0, 1.5], [torch.nan, 0.0]]))
    assert torch.equal(again.prompt, through.prompt)


def test_calibration_without_a_reader_is_refused_before_training() -> None:
    config = DistillConfig(calibration=CalibrationConfig(prompts=2))
    with pytest.raises(UserError, match=r"guard\.model"):
        _reader(config)
