"""An SDE step with its log-probability against the formula as the papers' codes write it, on the same numbers.

Both sides take each step of a schedule and value its outcome again under another velocity, as a training does, with
the same noise given and no network. The plain side is Flow-GRPO's `sde_step_with_logprob` and its two relatives term by
term; ours is `tools/diffusion/sde.py`. They take turns, and processor time counts, so that a busy machine slows both
alike. `max_difference` is over states, means and log-probabilities of all kinds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from ...tools.diffusion.sde import SDE, SDEKind
from ...tools.fingerprint import versions

_LEVELS: dict[str, float] = {"flow": 0.7, "dance": 0.3, "cps": 0.8}

#: (state, velocity, step, noise, next state to value or None to draw it) → (next state, mean, log-probability)
_Step = Callable[[Tensor, Tensor, int, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def main(
    steps: int = 10, batch: int = 8, channels: int = 16, side: int = 64, rounds: int = 15, threads: int = 1
) -> dict[str, Any]:
    """SDE step with log-probability against the plain formula.

    Args:
        steps: Of the schedule (time shift 3).
        batch: Rows of the latents.
        channels: Of the latents.
        side: Their height and width.
        rounds: Times that each side takes all steps; the first is left out.
        threads: Threads of torch.

    Returns:
        The document with `figures`: max_difference, and the plain side's seconds over ours: ratio (of Flow-GRPO's
        step), dance_ratio, cps_ratio.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = torch.linspace(1, 0, steps + 1)
        times = 3 * times / (1 + 2 * times)
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(batch, channels, side, side, generator=generator) for _ in range(4)]
        apart, seconds = 0.0, {}
        for kind in get_args(SDEKind):
            sides = {"ours": _ours(times, kind), "plain": _plain(times, kind)}
            # The last step of "cps" has no noise, and so no density.
            last = steps - (kind == "cps")
            spent: dict[str, list[float]] = {name: [] for name in sides}
            for k in range(last):
                ours, plain = (_both(step, k, *tensors) for step in sides.values())
                pairs = zip(ours, plain, strict=True)
                apart = max(apart, *((one - other).abs().max().item() for one, other in pairs))
            for _ in range(rounds + 1):
                for name, step in sides.items():
                    begun = time.process_time()
                    for k in range(last):
                        _both(step, k, *tensors)
                    spent[name].append(time.process_time() - begun)
            seconds[kind] = {name: median(values[1:]) for name, values in spent.items()}
    finally:
        torch.set_num_threads(before)
    ratios = {kind: it["plain"] / it["ours"] for kind, it in seconds.items()}
    figures = {"max_difference": apart, "ratio": ratios["flow"]}
    figures |= {f"{kind}_ratio": ratio for kind, ratio in ratios.items() if kind != "flow"}
    return {"figures": figures, "seconds": seconds, "n": rounds, "versions": versions("torch")}


def _both(step: _Step, k: int, x: Tensor, velocity: Tensor, other: Tensor, noise: Tensor) -> list[Tensor]:
    """A step drawn under one velocity and valued under another: next state, means, log-probabilities."""
    after, *drawn = step(x, velocity, k, noise, None)
    return [after, *drawn, *step(x, other, k, noise, after)[1:]]


def _ours(times: Tensor, kind: SDEKind) -> _Step:
    sde = SDE(times, kind, _LEVELS[kind])

    def step(
        x: Tensor, velocity: Tensor, k: int, noise: Tensor, after: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if after is None:
            return sde.step(x, velocity, k, noise)
        mean = sde.mean(x, velocity, k)
        return after, mean, sde.log_prob(after, mean, k)

    return step


def _plain(times: Tensor, kind: SDEKind) -> _Step:
    level = _LEVELS[kind]

    def step(
        x: Tensor, velocity: Tensor, k: int, noise: Tensor, after: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sigma, following = times[k], times[k + 1]
        dt = following - sigma
        clean = x - sigma * velocity
        if kind == "flow":
            std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, times[1], sigma))) * level
            mean = (
                x * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
            )
            deviation = std * torch.sqrt(-dt)
        elif kind == "dance":
            score = -(x - clean * (1 - sigma)) / sigma**2
            mean = x + dt * velocity - 0.5 * level**2 * score * dt
            deviation = level * torch.sqrt(-dt)
        else:
            deviation = following * math.sin(level * math.pi / 2)
            noisy = x + velocity * (1 - sigma)
            mean = clean * (1 - following) + noisy * torch.sqrt(following**2 - deviation**2)
        if after is None:
            after = mean + deviation * noise
        log_prob = -((after - mean) ** 2)
        if kind != "cps":
            log_prob = (
                log_prob / (2 * deviation**2)
                - torch.log(deviation)
                - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
            )
        return after, mean, log_prob.mean(dim=(1, 2, 3))

    return step
