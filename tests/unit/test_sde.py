"""SDE samplers against the numbers of the implementations that others publish with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from emoloop.tools.diffusion.sde import SDE

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "sde.json").read_text())
TIMES, START, VELOCITY, NOISE = (torch.tensor(GOLDEN[key]) for key in ("times", "start", "velocity", "noise"))
KINDS = ("flow", "dance", "cps")


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_log_probabilities_are_the_reference_implementations(kind: str) -> None:
    """Flow-GRPO's `sde_step_with_logprob`, and verl-omni's scheduler, over a schedule of ten steps."""
    sde = SDE(TIMES, kind, GOLDEN[kind]["level"])  # type: ignore[arg-type]
    x = START
    for k, wanted in enumerate(GOLDEN[kind]["steps"]):
        made = sde.step(x, VELOCITY[k], k, NOISE[k])
        for name in ("after", "mean", "log_prob"):
            torch.testing.assert_close(getattr(made, name), torch.tensor(wanted[name]), rtol=1e-6, atol=1e-6)
        again = sde.log_prob(made.after, sde.mean(x, VELOCITY[k], k), k)
        torch.testing.assert_close(again, torch.tensor(wanted["log_prob"]), rtol=1e-6, atol=1e-6)
        x = made.after


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_at_different_steps(kind: str) -> None:
    sde = SDE(TIMES, kind, 0.5)  # type: ignore[arg-type]
    steps = torch.tensor([7, 0])
    both = sde.step(START, VELOCITY[0], steps, NOISE[0])
    for row, k in enumerate(steps.tolist()):
        alone = sde.step(START[row : row + 1], VELOCITY[0][row : row + 1], k, NOISE[0][row : row + 1])
        for one, other in zip(both, alone, strict=True):
            assert torch.equal(one[row : row + 1], other)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_a_step_is_the_flows_own(kind: str) -> None:
    sde = SDE(TIMES, kind, 1e-9)  # type: ignore[arg-type]
    for k in range(10 if kind != "cps" else 9):
        euler = START + (TIMES[k + 1] - TIMES[k]) * VELOCITY[k]
        torch.testing.assert_close(sde.mean(START, VELOCITY[k], k), euler, rtol=1e-5, atol=1e-6)


def test_half_precision_in_is_float32_out_and_gradients_reach_the_mean_alone() -> None:
    sde = SDE(TIMES, "flow", 0.7)
    made = sde.step(START.bfloat16(), VELOCITY[0].bfloat16(), 0, NOISE[0])
    assert {it.dtype for it in made} == {torch.float32}
    velocity = VELOCITY[0].clone().requires_grad_(True)
    mean = sde.mean(START, velocity, 0)
    sde.log_prob(made.after, mean, 0).sum().backward()
    # d log p / d v = b (x' - μ) / s² / dimensions, with b by a step of the velocity alone.
    b = (sde.mean(START, VELOCITY[0] + 1, 0) - sde.mean(START, VELOCITY[0], 0)).double()
    closed = b * (made.after - mean.detach()).double() / sde.deviation[0].double() ** 2 / 8
    assert velocity.grad is not None
    torch.testing.assert_close(velocity.grad.double(), closed, rtol=1e-4, atol=1e-6)


def test_a_density_integrates_to_one() -> None:
    sde = SDE(TIMES, "dance", 0.4)
    grid = torch.linspace(-4, 4, 4001).reshape(-1, 1, 1, 1)
    density = sde.log_prob(grid, torch.full_like(grid, 0.3), torch.full((4001,), 4)).exp()
    assert math.isclose(float(torch.trapezoid(density, grid.flatten())), 1.0, abs_tol=1e-4)
