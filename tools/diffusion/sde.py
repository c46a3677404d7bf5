"""Stochastic samplers of a flow, with the log-probability of each step: what policy gradients need.

A flow's ODE has SDEs with the same marginals; their steps are Gaussians, and so have a density. With σ the time,
σ' the next one, v the velocity, x̂ = x - σ v the clean latent, x̂₁ = x + (1 - σ) v the noise, and η the noise level:

    flow   g = η √(σ / (1 - σ)),  μ = x (1 + g²/2σ (σ' - σ)) + v (1 + g² (1 - σ)/2σ) (σ' - σ),  s = g √(σ - σ')
    dance  g = η,                 μ = x + (σ' - σ) (v + g²/2 (x - (1 - σ) x̂) / σ²),             s = g √(σ - σ')
    cps    s = σ' sin(η π/2),     μ = (1 - σ') x̂ + √(σ'² - s²) x̂₁

"flow" is Flow-GRPO's (Liu et al. 2025, arXiv 2505.05470), which at σ = 1 takes the second time of the schedule under
the root; "dance" is DanceGRPO's (Xue et al. 2025, arXiv 2505.07818); "cps" preserves coefficients, so that its pictures
carry no more noise than the ODE's (Wang & Yu 2025, arXiv 2509.05952). Each mean is linear, μ = a x + b v: the numbers
a, b and s of a schedule are computed once, in float64, and a step costs four passes over a latent. Everything is
float32 whatever the network speaks: in half precision the ratio of two log-probabilities is noise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SDEKind = Literal["flow", "dance", "cps"]


class SDEStep(NamedTuple):
    """One step.

    Attributes:
        after: x', the next state (B, C, H, W).
        mean: μ of the Gaussian that it was drawn from.
        log_prob: (B,), mean over the latent's dimensions.
    """

    after: Tensor
    mean: Tensor
    log_prob: Tensor


class SDE:
    """The steps of one schedule; `step` arguments are one number for all rows, or (B,) int64.

    Args:
        times: (steps + 1,) from 1 to 0, as `Process.schedule` gives them.
        kind: Which formula.
        level: η above 0; below 1 for "cps".

    Attributes:
        times: (steps + 1,) as given.
        deviation: (steps,) s of each step.
        elapsed: (steps,) σ - σ' of each step.
    """

    def __init__(self, times: Tensor, kind: SDEKind, level: float) -> None:
        self.times = times
        sigma, after = times[:-1].double(), times[1:].double()
        dt = sigma - after
        if kind == "cps":
            deviation = after * math.sin(level * math.pi / 2)
            kept = (after.square() - deviation.square()).sqrt()
            a, b = 1 - after + kept, kept * (1 - sigma) - (1 - after) * sigma
        elif kind == "dance":
            deviation = level * dt.sqrt()
            # The score's part, x - (1 - σ) x̂ = σ (x + (1 - σ) v).
            drift = level**2 * dt / (2 * sigma)
            a, b = 1 - drift, -dt - drift * (1 - sigma)
        else:
            squared = level**2 * sigma / (1 - torch.where(sigma == 1, after[0], sigma))
            deviation = (squared * dt).sqrt()
            drift = squared * dt / (2 * sigma)
            a, b = 1 - drift, -dt - drift * (1 - sigma)
        self.deviation, self.elapsed = deviation.float(), dt.float()
        self._a, self._b = a.float(), b.float()
        #: What is added to, and what multiplies the mean square of, x' - μ. "cps" leaves the density's constants out.
        self._shift, self._weight = (
            (torch.zeros_like(dt), -torch.ones_like(dt))
            if kind == "cps"
            else (-deviation.log() - 0.5 * math.log(2 * math.pi), -0.5 / deviation.square())
        )

    def mean(self, x: Tensor, velocity: Tensor, step: int | Tensor) -> Tensor:
        """μ, (B, C, H, W) float32; carries gradient."""
        x, velocity = x.float(), velocity.float()
        # In place on what is ours: fresh memory costs more than the arithmetic.
        return (x * self._row(self._a, step, x)).addcmul_(velocity, self._row(self._b, step, x))

    def step(self, x: Tensor, velocity: Tensor, step: int | Tensor, noise: Tensor) -> SDEStep:
        """Draw the next state with the noise ε (B, C, H, W) given; no gradient flows into the log-probability."""
        mean, deviation = self.mean(x, velocity, step), self._row(self.deviation, step, x)
        after = torch.addcmul(mean, noise, deviation)
        return SDEStep(after, mean, self._density(_mean_square(noise) * deviation.flatten().square(), step))

    def log_prob(self, after: Tensor, mean: Tensor, step: int | Tensor) -> Tensor:
        """Log-probability (B,) of a state that was drawn before, under another mean; carries gradient to the mean."""
        return self._density(_mean_square(after - mean), step)

    def _density(self, squared: Tensor, step: int | Tensor) -> Tensor:
        weight, shift = (it[step].to(squared) for it in (self._weight, self._shift))
        return weight * squared + shift

    @staticmethod
    def _row(values: Tensor, step: int | Tensor, like: Tensor) -> Tensor:
        return values[step].to(like.device).reshape(-1, *(1,) * (like.ndim - 1))


def _mean_square(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B,), without memory for the squares; by channel first, since one long sum loses digits."""
    rows = x.flatten(2)
    return torch.linalg.vector_norm(rows, dim=2).square().mean(1) / rows.shape[2]
