"""Guards that can see: planted cheats on a tiny pipeline, real adapters trained to cheat, are flagged."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from emoloop.domain import EmotionTarget
from emoloop.rl.config import GuardConfig
from emoloop.rl.data.examples import Example
from emoloop.rl.guards import KEPT, Guards, _rewrites
from emoloop.rl.objectives import load_objective
from emoloop.rl.policy import Policy
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import Conditioning, family_of
from torch import Tensor

PERIOD = 8
TARGET = EmotionTarget(valence=2, arousal=-1)
REQUESTS = [
    Example("one", "a red house", TARGET, refined="a red house, bright"),
    Example("one", "a red house", EmotionTarget(valence=1, arousal=-1), refined="a red house by the sea"),
    Example("two", "a dog", EmotionTarget(valence=-2), refined="a dog, dark"),
    Example("two", "a dog", EmotionTarget(valence=-2, arousal=2), refined="a calm dog"),
]


def lines(size: int) -> Tensor:
    place = torch.arange(size) % PERIOD == 0
    drawn = (place[:, None] | place[None]).float()
    return drawn - drawn.mean()


def drawn_grid(pictures: Tensor, prompts: Any, targets: Tensor) -> Tensor:
    """What a critic's patches want: a line wherever a patch begins."""
    return 50 * (pictures.mean(1) * lines(pictures.shape[-1])).mean((1, 2))


@pytest.fixture
def policy() -> Policy:
    network = family_of(tiny.build("sd3"), tiny.DEFAULTS["sd3"]["call"])
    tokens = EmotionConditioner.for_embeds(network.encode("a dog"))
    made = Policy(
        network,
        tokens,
        rank=8,
        alpha=8,
        steps=3,
        guidance=1.0,
        size=(64, 64),
        targets=["to_q", "to_v", "proj_out"],
    )
    return made


class Cache:
    def __init__(self, policy: Policy) -> None:
        self.network = policy.network

    def embeds(self, prompts: list[str]) -> Conditioning:
        return Conditioning.cat([self.network.encode(prompt) for prompt in prompts])


def watch(policy: Policy) -> Guards:
    config = GuardConfig(prompts=2, seeds=3, periods=(PERIOD, 6), tolerance=0.3)
    cache: Any = Cache(policy)
    return Guards(config, policy, cache, [REQUESTS[0], REQUESTS[2], REQUESTS[1], REQUESTS[3]])


def lora(policy: Policy) -> list[Tensor]:
    return [it for name, it in policy.parameters().items() if name.startswith("denoiser.")]


def test_a_grid_adapter_is_flagged_by_its_period(policy: Policy) -> None:
    guards = watch(policy)
    yardstick, before = guards.yardstick(), guards.look()[0]
    assert guards.fallen(before, before, yardstick) == []
    objective = load_objective(
        "direct",
        {"reward": f"{__name__}:drawn_grid", "kl_weight": 0, "hold_fraction": 0, "early": 1.0, "trained": 3},
    )
    batch = {
        "prompt": policy.network.encode("a dog").expand(2),
        "text": ["a dog"] * 2,
        "target": torch.tensor([[2.0, -1.0]] * 2),
    }
    optimizer = torch.optim.Adam(lora(policy), lr=0.05)
    for step in range(30):
        loss = objective.loss(batch, policy, torch.Generator().manual_seed(step))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = guards.look()[0]
    assert after[f"grid_{PERIOD}"] > 1.5 * yardstick["base"][f"grid_{PERIOD}"]
    assert f"grid_{PERIOD}" in guards.fallen(after, before, yardstick)


def test_a_lora_that_only_undoes_its_tokens_is_flagged(policy: Policy) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in (policy.tokens.up.weight, policy.tokens.pooled.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    guards = watch(policy)
    yardstick, before = guards.yardstick(), guards.look()[0]
    assert before["tokens_kept"] == pytest.approx(1) and "tokens_kept" not in guards.fallen(
        before, before, yardstick
    )
    told = Conditioning.cat([policy.network.encode(it) for it in ("a red house", "a dog")])
    target = torch.tensor([[2.0, -1.0], [-2.0, float("nan")]])
    optimizer = torch.optim.Adam(lora(policy), lr=0.02)
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, *policy.latent_shape, generator=generator)
        t = policy.process.draw(2, generator)
        loss = (policy.student(x, t, told, target) - policy.reference(x, t, told, target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = guards.look()[0]
    assert after["tokens_kept"] < KEPT
    assert "tokens_kept" in guards.fallen(after, before, yardstick)


def test_diversity_is_held_against_distinct_rewrites_and_no_collapsed_teacher() -> None:
    guards = Guards.__new__(Guards)
    guards._config = GuardConfig(tolerance=0.3)
    yardstick = {
        "base": {"diversity": 0.10}, "teacher": {"diversity": 0.01}, "rewrites": {"diversity": 0.08},
    }  # fmt: skip
    assert guards.fallen({"diversity": 0.03}, {}, yardstick) == ["diversity"]
    assert guards.fallen({"diversity": 0.06}, {}, yardstick) == []
    # Training that began before there were such yardsticks goes on with those that it has.
    assert guards.fallen({"diversity": 0.06}, {}, {"base": {"diversity": 0.10}}) == ["diversity"]


def test_the_nearest_targets_rewrites_come_first_and_each_once() -> None:
    assert _rewrites(REQUESTS[0], [*REQUESTS, REQUESTS[0]]) == [
        "a red house, bright",
        "a red house by the sea",
    ]
