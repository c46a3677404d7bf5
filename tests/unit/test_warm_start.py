"""The start on text: its loss in closed form, and that it goes the way from one prompt to the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emoloop.domain import UserError
from emoloop.rl.warm_start import CHOICE, text_loss, warm_start
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import Conditioning


def batch(step: int, n: int = 16, pooled: bool = True) -> dict[str, object]:
    """Prompts whose refined form moves every row along a direction that the target sets."""
    generator = torch.Generator().manual_seed(step)
    prompt, flat = torch.randn(n, 4, 6, generator=generator), torch.randn(n, 5, generator=generator)
    target = torch.rand(n, 2, generator=generator) * 4 - 2
    way = torch.cat([target, target.flip(1), target], 1)
    return {
        "prompt": Conditioning(prompt, flat if pooled else None),
        "added": Conditioning(prompt + way[:, None], flat + way[:, :5] if pooled else None),
        "target": target,
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_the_loss_counts_what_is_left_of_the_way(pooled: bool) -> None:
    untrained, at = EmotionConditioner(6, 5 if pooled else 0), batch(0, pooled=pooled)
    assert text_loss(untrained, at).item() == pytest.approx(2.0 if pooled else 1.0)

    def told(share: float) -> object:
        prompt, added = at["prompt"], at["added"]
        moved = torch.lerp(prompt.prompt, added.prompt, share)  # type: ignore[attr-defined]
        flat = torch.lerp(prompt.pooled, added.pooled, share) if pooled else None  # type: ignore[attr-defined]
        return lambda embeds, inputs: Conditioning(moved, flat)

    for share in (0.0, 0.5, 1.0):
        wanted = (2 if pooled else 1) * (1 - share) ** 2
        assert text_loss(told(share), at).item() == pytest.approx(wanted, abs=1e-6)  # type: ignore[arg-type]


def test_the_choice_counts_beside_the_way() -> None:
    torch.manual_seed(0)
    tokens, at = EmotionConditioner(6, 5, rank=16, hidden=32, choices=3), batch(0)
    phrase = torch.arange(16) % 3
    way, logits = text_loss(tokens, at), tokens.choice(at["prompt"], at["target"])  # type: ignore[arg-type]
    assert way.item() == pytest.approx(2.0) and logits.shape == (16, 3)
    surprise = -logits.log_softmax(-1)[torch.arange(16), phrase].mean()
    assert text_loss(tokens, {**at, "phrase": phrase}).item() == pytest.approx(
        (way + CHOICE * surprise).item(), abs=1e-6
    )


def test_tokens_learn_to_choose_what_the_prompt_and_the_wish_ask_for() -> None:
    """Three phrases; which of them a wish gets depends on where the prompt stands already."""
    said = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) * 3

    def asked(step: int) -> dict[str, Any]:
        at: dict[str, Any] = batch(step, n=64, pooled=False)
        prompt = at["prompt"].prompt
        stands = torch.nn.functional.layer_norm(prompt, (6,)).mean(1)[:, 0] * 2
        phrase = torch.bucketize(at["target"][:, 0] - stands, torch.tensor([-0.5, 0.5]))
        return {**at, "phrase": phrase, "added": Conditioning(prompt + said[phrase][:, None])}

    torch.manual_seed(0)
    taught = warm_start(EmotionConditioner(6, rank=16, hidden=32, choices=3), asked, 400)[0]
    fresh = asked(10_000)
    chosen = taught.choice(fresh["prompt"], fresh["target"]).argmax(-1)
    assert (chosen == fresh["phrase"]).float().mean() > 0.85


def test_it_teaches_a_copy_the_same_way_each_time() -> None:
    torch.manual_seed(0)
    tokens = EmotionConditioner(6, 5, rank=16, hidden=32)
    before = {name: value.clone() for name, value in tokens.state_dict().items()}
    first, second = (warm_start(tokens, batch, 150) for _ in range(2))
    (one, loss, left), (other, again, _) = first, second
    assert left is None
    assert loss == again < 0.8
    assert text_loss(one, batch(10_000)).item() < 1.2
    for name, value in tokens.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_it_breaks_off_when_asked_and_goes_on_as_if_it_had_not() -> None:
    torch.manual_seed(0)
    tokens = EmotionConditioner(6, 5)
    whole, loss, _ = warm_start(tokens, batch, 30)
    asked = iter([False] * 10 + [True])
    _, unknown, left = warm_start(tokens, batch, 30, lambda: next(asked))
    assert left is not None and len(left["losses"]) == 10 and unknown != unknown
    rest, again, none = warm_start(tokens, batch, 30, begun=left)
    assert none is None and again == loss
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name])


def test_tokens_of_rank_0_speak_by_the_pooled_embeddings_alone() -> None:
    torch.manual_seed(0)
    at = batch(0)
    taught = warm_start(EmotionConditioner(6, 5, rank=0, hidden=32), batch, 150)[0]
    told = taught(at["prompt"], {"target": at["target"]})  # type: ignore[arg-type]
    assert torch.equal(told.prompt, at["prompt"].prompt)  # type: ignore[attr-defined]
    assert not torch.allclose(told.pooled, at["prompt"].pooled)  # type: ignore[attr-defined]
    # All of the way that rows would go is left, and little of the other.
    assert 1.0 <= text_loss(taught, at).item() < 1.6
    with pytest.raises(UserError, match="this model has none"):
        EmotionConditioner(6, rank=0)
