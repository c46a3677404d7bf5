"""EmotionConditioner: exactly the base at the start, trainable, and nothing at scale 0."""

from pathlib import Path

import pytest
import tiny
import torch
from emoloop.domain import Emotion, EmotionTarget, UserError
from emoloop.tools.diffusion.conditioners import EmotionConditioner, points
from emoloop.tools.diffusion.families import Conditioning, family_of


@pytest.fixture(params=tiny.NAMES)
def embeds(request) -> Conditioning:
    pipe = tiny.build(request.param)
    family = family_of(pipe, tiny.DEFAULTS[request.param]["call"])
    return Conditioning.cat([family.encode(text) for text in ("a dog", "a cat", "the sea")])


WANTED = points([EmotionTarget(valence=2, arousal=-1), EmotionTarget(arousal=3), None])


def test_points_are_numbers_with_gaps():
    rows = points([EmotionTarget(valence=2), EmotionTarget(category=Emotion.AWE), None])
    assert rows.dtype == torch.float32
    assert rows.shape == (3, 2)
    assert rows[0, 0] == 2 and rows[0, 1].isnan()
    assert rows[1].tolist() == pytest.approx([1.2, 1.5])
    assert rows[2].isnan().all()
    assert points([]).shape == (0, 2)


def test_an_untrained_module_is_exactly_the_base(embeds: Conditioning):
    out = EmotionConditioner.for_embeds(embeds)(embeds, {"target": WANTED})
    assert torch.equal(out.prompt, embeds.prompt)
    assert (out.pooled is None) == (embeds.pooled is None)
    if out.pooled is not None and embeds.pooled is not None:
        assert torch.equal(out.pooled, embeds.pooled)


def test_it_learns_from_the_first_step_on(embeds: Conditioning):
    module = EmotionConditioner.for_embeds(embeds, tokens=2)
    out = module(embeds, {"target": WANTED})
    goal = torch.randn_like(out.prompt)
    (out.prompt - goal).pow(2).mean().backward()
    assert module.up.weight.grad is not None and module.up.weight.grad.abs().sum() > 0
    assert module.up_extra.weight.grad is not None and module.up_extra.weight.grad.abs().sum() > 0


@pytest.fixture
def moved(embeds: Conditioning) -> EmotionConditioner:
    torch.manual_seed(0)
    module = EmotionConditioner.for_embeds(embeds, tokens=2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def test_a_row_without_target_gets_no_residual_and_scale_zero_drops_everything(
    embeds: Conditioning, moved: EmotionConditioner
):
    out = moved(embeds, {"target": WANTED})
    length = embeds.prompt.shape[1]
    assert out.prompt.shape[1] == length + 2
    assert not torch.equal(out.prompt[0, :length], embeds.prompt[0])
    assert torch.equal(out.prompt[2, :length], embeds.prompt[2])
    assert torch.equal(out.prompt[2], moved.null(embeds).prompt[2])
    if out.pooled is not None and embeds.pooled is not None:
        assert torch.equal(out.pooled[2], embeds.pooled[2])
        assert not torch.equal(out.pooled[1], embeds.pooled[1])
    assert moved(embeds, {"target": WANTED}, scale=0.0) is embeds
    half, full = moved(embeds, {"target": WANTED}, scale=0.5).prompt, out.prompt
    base = embeds.prompt
    torch.testing.assert_close(half[:, :length] - base, (full[:, :length] - base) / 2, rtol=1e-3, atol=1e-5)


def test_a_missing_axis_is_not_a_zero(embeds: Conditioning, moved: EmotionConditioner):
    gap, zero = points([EmotionTarget(valence=1)] * 3), points([EmotionTarget(valence=1, arousal=0)] * 3)
    assert not torch.equal(moved(embeds, {"target": gap}).prompt, moved(embeds, {"target": zero}).prompt)


def test_it_keeps_the_dtype_of_the_model(embeds: Conditioning, moved: EmotionConditioner):
    low = Conditioning(embeds.prompt.bfloat16(), None if embeds.pooled is None else embeds.pooled.bfloat16())
    assert moved(low, {"target": WANTED}).prompt.dtype == torch.bfloat16
    assert moved.null(low).prompt.dtype == torch.bfloat16


def test_saving_keeps_weights_and_shape(embeds: Conditioning, moved: EmotionConditioner, tmp_path: Path):
    moved.save(tmp_path / "t.safetensors")
    loaded = EmotionConditioner.load(tmp_path / "t.safetensors")
    assert loaded.config == moved.config
    assert torch.equal(loaded(embeds, {"target": WANTED}).prompt, moved(embeds, {"target": WANTED}).prompt)
    assert loaded.fits(embeds)
    assert not EmotionConditioner(7, 3).fits(embeds)
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 32)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        EmotionConditioner.load(tmp_path / "bad.safetensors")
