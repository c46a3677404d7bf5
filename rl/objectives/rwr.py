"""Reward-weighted regression (Peters & Schaal 2007; for diffusion: Lee et al., arXiv 2302.12192).

L = E[ G · softmax(R / T over the group) · || v_θ(x_t, t | neutral, target) - v(x_0, ε) ||² ]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics, Objective

if TYPE_CHECKING:
    from ..policy import Policy


def reward_weights(reward: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Softmax weight of each image in its group, times the group's size: 1 on average.

    Args:
        reward: (B,) rewards.
        rewards: (B, G) rewards of the groups, NaN where a group is smaller.
        temperature: T; small picks the best, large weighs all alike.
    """
    scaled = torch.where(rewards.isnan(), -torch.inf, rewards / temperature)
    size = (~rewards.isnan()).sum(1)
    return size * (reward / temperature - scaled.logsumexp(1)).exp()


class RWR(Objective):
    """Regression on all images of a run, better ones weighing more."""

    temperature: float = Field(default=0.1, gt=0)
    """T, in units of reward."""

    @property
    def required_keys(self) -> frozenset[str]:
        """Images with the rewards of their group."""
        return frozenset({"prompt", "target", "latents", "reward", "rewards"})

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        error, hold = self.regress(batch, "latents", policy, generator)
        weights = reward_weights(batch["reward"], batch["rewards"], self.temperature)
        loss = (weights * error).mean()
        return loss + hold, {
            "error": error.mean().item(),
            "weight_max": weights.max().item(),
            "hold": hold.item(),
        }
