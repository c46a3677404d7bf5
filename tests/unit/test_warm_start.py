"""The start on text: its loss in closed form, and that it goes the way from one prompt to the other."""

from __future__ import annotations

import pytest
import torch
from emoloop.rl.warm_start import text_loss, warm_start
from emoloop.tools.emotion_tokens import EmotionTokens
from emoloop.tools.families import Embeds


def batch(step: int, n: int = 16, pooled: bool = True) -> dict[str, object]:
    """Prompts whose refined form moves every row along a direction that the target sets."""
    generator = torch.Generator().manual_seed(step)
    prompt, flat = torch.randn(n, 4, 6, generator=generator), torch.randn(n, 5, generator=generator)
    target = torch.rand(n, 2, generator=generator) * 4 - 2
    way = torch.cat([target, target.flip(1), target], 1)
    return {
        "prompt": Embeds(prompt, flat if pooled else None),
        "refined": Embeds(prompt + way[:, None], flat + way[:, :5] if pooled else None),
        "target": target,
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_the_loss_counts_what_is_left_of_the_way(pooled: bool) -> None:
    untrained, at = EmotionTokens(6, 5 if pooled else 0), batch(0, pooled=pooled)
    assert text_loss(untrained, at).item() == pytest.approx(2.0 if pooled else 1.0)

    def told(share: float) -> object:
        prompt, refined = at["prompt"], at["refined"]
        moved = torch.lerp(prompt.prompt, refined.prompt, share)  # type: ignore[attr-defined]
        flat = torch.lerp(prompt.pooled, refined.pooled, share) if pooled else None  # type: ignore[attr-defined]
        return lambda embeds, target: Embeds(moved, flat)

    for share in (0.0, 0.5, 1.0):
        wanted = (2 if pooled else 1) * (1 - share) ** 2
        assert text_loss(told(share), at).item() == pytest.approx(wanted, abs=1e-6)  # type: ignore[arg-type]


def test_it_teaches_a_copy_the_same_way_each_time() -> None:
    torch.manual_seed(0)
    tokens = EmotionTokens(6, 5, rank=16, hidden=32)
    before = {name: value.clone() for name, value in tokens.state_dict().items()}
    one, loss = warm_start(tokens, batch, 150)
    other, again = warm_start(tokens, batch, 150)
    assert loss == again < 0.8
    assert text_loss(one, batch(10_000)).item() < 1.2
    for name, value in tokens.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(one.state_dict()[name], other.state_dict()[name])
