"""Groups of pictures with what policy gradients need: an ODE, and in a window of its steps an SDE with densities.

Before the window a group that shares its noise is one row; from there on each picture has its own noise (MixGRPO, Li et
al. 2025, arXiv 2507.21802). Without guidance: one pass of the network a step, and a policy whose density is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...tools.diffusion.families import Conditioning
from ...tools.diffusion.sde import SDE, SDEStep
from ..policy import Policy


class Drawn(NamedTuple):
    """A step that was drawn with noise, for a whole group: its number, the states before it, and what came."""

    step: int
    state: Tensor
    made: SDEStep


@torch.no_grad()
def sample_group(
    policy: Policy,
    sde: SDE,
    told: Conditioning,
    target: Tensor,
    seeds: Sequence[int],
    window: range,
    shared: bool = False,
) -> tuple[Tensor, list[Drawn]]:
    """Sample one group by the student.

    Args:
        policy: Whose student samples.
        sde: The steps.
        told: (1) the neutral prompt.
        target: (1, 2).
        seeds: Of each picture's noise, drawn on the CPU; without a window they give the pictures of `Policy.sample`
            at guidance 1.
        window: The steps that are drawn with noise.
        shared: All begin with the first one's noise.

    Returns:
        Clean latents (B, C, H, W) float32, and the steps of the window.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        shape = (1, *policy.latent_shape)
        return torch.cat([torch.randn(shape, generator=it) for it in generators]).to(policy.device)

    x, drawn = noise(), list[Drawn]()
    if shared:
        x = x[:1]
    for k, (t, t_next) in enumerate(pairwise(sde.times)):
        if k == window.start:
            x = x.expand(len(seeds), *x.shape[1:])
        velocity = policy.student(x, t.expand(len(x)), told.expand(len(x)), target.expand(len(x), 2))
        if k in window:
            made = sde.step(x, velocity, k, noise())
            drawn.append(Drawn(k, x, made))
            x = made.after
        else:
            x = policy.process.step(x, velocity.to(x), t, t_next)
    return x.expand(len(seeds), *x.shape[1:]), drawn
