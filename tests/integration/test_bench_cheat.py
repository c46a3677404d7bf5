"""The planted cheat: a gradient really runs from the critic's words to the adapter, and the adapter loads."""

import json

import pytest
import torch
from emoloop.domain import EmotionTarget
from emoloop.evals.studies import cheat
from emoloop.evals.suites import load_suite
from emoloop.settings import load_settings
from emoloop.tools.images.load import load_generator


@pytest.mark.training
def test_the_critic_teaches_an_adapter_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(cheat, "SCENES", 20)
    monkeypatch.setattr(cheat, "EVERY", 1)
    monkeypatch.setattr(cheat, "LOOK", 2)
    start = load_suite("distill").adapters["opd"]
    targets = [EmotionTarget(valence=1.8, arousal=-1.0)]
    # The guard's alignment is never above 1: the first look ends it.
    cheat.plant(tmp_path / "cheat", start, targets, steps=3, batch=2, lr=1e-2, until=1.0, seed=0)
    figures = json.loads((tmp_path / "cheat" / "training.json").read_text())["figures"]
    assert figures["steps"] == 1
    settings = load_settings().generator.model_copy(update={"adapter": str(tmp_path / "cheat")})
    assert load_generator(settings.model, settings).describe()["adapter"]


def test_likelier_pixels_surprise_the_critic_less():
    """Down the gradient of its surprise, a picture comes nearer to the answer that is wanted."""
    critic = cheat._Critic("miniature")
    request = load_suite("distill").requests[0]
    wanted = ['{"analysis": "fox sea clear bright vivid warm, colour +1.2+0.6, sun right"']
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(1, 3, 96, 96, generator=generator) - 0.5).requires_grad_()
    before = critic.surprise(pixels, [request], wanted)
    before.backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    after = critic.surprise((pixels - 0.3 * pixels.grad / pixels.grad.norm()).detach(), [request], wanted)
    assert after < before
