"""The calibrated dial: against hand-made curves, and what emotion tokens hear through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emoloop.emotion import UserError
from emoloop.rl.calibration import calibrate, inverse, respond
from emoloop.rl.config import CalibrationConfig, DistillConfig
from emoloop.rl.distill import _reader
from emoloop.rl.networks import Conditioning
from emoloop.tools.emotion_tokens import EmotionTokens
from emoloop.tools.families import Embeds

GRID = np.stack(np.meshgrid(np.linspace(-3, 3, 5), np.linspace(-3, 3, 5), indexing="ij"), -1).reshape(-1, 2)


def read(asked: np.ndarray) -> np.ndarray:
    """Too weak, off centre, and the one axis pulls at the other."""
    valence, arousal = asked.T
    return np.stack(
        [0.7 * valence - 0.1 * arousal - 0.2, 0.8 * arousal - 0.2 * valence + 0.05 * valence**2], 1
    )


def test_the_surface_finds_the_coefficients_that_made_the_readings() -> None:
    surface = respond(GRID, read(GRID))
    assert surface[:, 0] == pytest.approx([-0.2, 0.7, -0.1, 0, 0, 0], abs=1e-10)
    assert surface[:, 1] == pytest.approx([0, -0.2, 0.8, 0.05, 0, 0], abs=1e-10)


def test_inverse_asks_for_what_reads_as_wished_and_stays_on_the_scale() -> None:
    surface = respond(GRID, read(GRID))
    wishes = np.array([[1.0, -1.0], [-1.5, 0.5], [0.0, 0.0]])
    assert read(inverse(surface, wishes)) == pytest.approx(wishes, abs=0.02)
    far = inverse(surface, np.array([[3.0, -3.0]]))
    assert np.abs(far).max() <= 3 and far[0, 0] > 2.9


class FakePolicy:
    """Its images are what it was told, put through a dial that is too weak and off centre."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tokens = EmotionTokens(6, 4)

    def sample(self, told: Any, target: torch.Tensor, seeds: list[int]) -> list[Any]:
        assert len(told) == len(target) == len(seeds)
        heard = self.tokens._hear(target).double().numpy()
        return [SimpleNamespace(valence=v, arousal=a) for v, a in read(heard).tolist()]


def test_a_calibrated_dial_reads_as_asked() -> None:
    policy: Any = FakePolicy()
    cache: Any = SimpleNamespace(embeds=lambda prompts: Conditioning(torch.zeros(len(prompts), 2, 6)))
    reader: Any = SimpleNamespace(read=lambda images: images)
    # Twice: it starts from a straight dial, so what an earlier calibration said is not counted again.
    for _ in range(2):
        report = calibrate(policy, cache, reader, ["a", "b", "a"], CalibrationConfig(prompts=2, knots=7))
    asked = torch.tensor([[1.0, -1.4], [-1.0, 1.5], [0.0, 0.3]])
    seen = policy.sample(asked, asked, [0, 0, 0])
    assert [(it.valence, it.arousal) for it in seen] == [
        pytest.approx(pair, abs=0.05) for pair in asked.tolist()
    ]
    assert report["asked"] == [-3, -2, -1, 0, 1, 2, 3]
    assert report["valence_read"][0][0] == pytest.approx(0.7 * -3 + 0.3 - 0.2, abs=1e-3)


def test_tokens_hear_through_the_dial_and_keep_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    tokens = EmotionTokens(6, 4, rank=3)
    torch.nn.init.normal_(tokens.up.weight)
    embeds = Embeds(torch.randn(2, 5, 6), torch.randn(2, 4))
    plain = tokens(embeds, torch.tensor([[2.0, 0.0], [torch.nan, -1.0]]))
    # Valence is heard as it is, but for a row that speaks of none; arousal is heard as half of it, less one.
    wishes = torch.tensor([-3.0, 0.0, 3.0])
    valence, arousal = torch.meshgrid(wishes, wishes, indexing="ij")
    tokens.calibrate(torch.stack([valence, 0.5 * arousal - 1]))
    through = tokens(embeds, torch.tensor([[2.0, 2.0], [torch.nan, 0.0]]))
    assert torch.allclose(plain.prompt, through.prompt, atol=1e-6)
    tokens.save(tmp_path / "tokens.safetensors")
    loaded = EmotionTokens.load(tmp_path / "tokens.safetensors")
    again = loaded(embeds, torch.tensor([[2.0, 2.0], [torch.nan, 0.0]]))
    assert torch.equal(again.prompt, through.prompt)


def test_calibration_without_a_reader_is_refused_before_training() -> None:
    config = DistillConfig(calibration=CalibrationConfig(prompts=2))
    with pytest.raises(UserError, match=r"guard\.model"):
        _reader(config)
