"""DiffusionNFT (arXiv 2509.16117): forward-process reinforcement with a positive and a negative policy.

    v± = (1 ∓ β) v_old ± β v_θ,    r = 1/2 + 1/2 clip(A, ±c) / c
    L  = E[ r ||x̂0⁺ - x0||² / w⁺ + (1 - r) ||x̂0⁻ - x0||² / w⁻ ] · c / β  +  λ ||v_θ - v_ref||²

in the space of clean images, each term divided by its own mean absolute error w (a constant), as the paper's
code does. The images have to come from v_old. Of a log they come from what made the traces, and so v_old is that: an
average that follows the student while the images stay has no fixed point (the loss then pulls by
-2β Cov(2r - 1, v) for ever). Where images are sampled again as the student moves, v_old is its moving average, as in
the paper. On groups beyond round 0 it is off-policy, and the dataset says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics, Objective, per_row

if TYPE_CHECKING:
    from ..policy import Policy


def group_advantage(reward: Tensor, rewards: Tensor) -> Tensor:
    """(R - mean of its group) / standard deviation of its group; 0 where the group is all alike.

    Args:
        reward: (B,) rewards.
        rewards: (B, G) rewards of the groups, NaN where a group is smaller.
    """
    mean = rewards.nanmean(1)
    std = (rewards - mean[:, None]).square().nanmean(1).sqrt()
    return torch.where(std > 1e-6, (reward - mean) / std.clamp_min(1e-6), torch.zeros_like(reward))


def nft_loss(
    clean_plus: Tensor, clean_minus: Tensor, clean: Tensor, advantage: Tensor, beta: float, clip: float
) -> Tensor:
    """The formula above without its last term.

    Args:
        clean_plus: (B, …) clean images implied by v⁺.
        clean_minus: (B, …) clean images implied by v⁻.
        clean: (B, …) the images.
        advantage: (B,) normalised advantages.
        beta: Mixing strength.
        clip: Advantages beyond ± this count as this.
    """
    optimality = 0.5 + 0.5 * advantage.clamp(-clip, clip) / clip

    def scaled(guess: Tensor) -> Tensor:
        width = (guess - clean).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        return per_row(guess - clean) / width

    return ((optimality * scaled(clean_plus) + (1 - optimality) * scaled(clean_minus)) * clip / beta).mean()


class NFT(Objective):
    """Negative-aware fine-tuning on groups of rewarded images."""

    beta: float = Field(default=1.0, gt=0)
    """Mixing strength; 1, or .1 for mixed rewards."""
    advantage_clip: float = Field(default=2.0, gt=0)
    """5 keeps r near 1/2 for most images; 1 to 2 sharpens."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """λ."""
    old: Literal["reference", "slow"] = "reference"
    """v_old: "reference" is what made the traces, "slow" the student's moving average, for images that are sampled
    again."""
    decay_rate: float = Field(default=0.001, ge=0)
    """The average's decay rises by this each step …"""
    decay_max: float = Field(default=0.5, ge=0, lt=1)
    """… up to this."""

    @property
    def required_keys(self) -> frozenset[str]:
        """Images with the rewards of their group."""
        return frozenset({"prompt", "target", "latents", "reward", "rewards"})

    def slow_decay(self, step: int) -> float | None:
        """The paper's first schedule, where v_old is the average."""
        return None if self.old == "reference" else min(self.decay_rate * step, self.decay_max)

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        clean, prompt, target = batch["latents"], batch["prompt"], batch["target"]
        x, t, _ = self.draw_states(batch, "latents", policy, generator)
        student, hold = self.with_hold(x, t, prompt, target, policy)
        old = (policy.slow if self.old == "slow" else policy.reference)(x, t, prompt, target)
        plus, minus = (
            policy.process.clean(x, (1 - sign * self.beta) * old + sign * self.beta * student, t)
            for sign in (1, -1)
        )
        advantage = group_advantage(batch["reward"], batch["rewards"])
        loss = nft_loss(plus, minus, clean, advantage, self.beta, self.advantage_clip)
        kl = loss.new_zeros(())
        if self.kl_weight:
            kl = per_row(student - policy.reference(x, t, prompt, target)).mean()
        return loss + self.kl_weight * kl + hold, {
            "nft": loss.item(),
            "kl": kl.item(),
            "hold": hold.item(),
            "drift": per_row(student.detach() - old).mean().item(),
        }
