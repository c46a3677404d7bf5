"""Flow-GRPO's loss against its formula in float64, and what becomes of groups that teach nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from emoloop.domain import UserError
from emoloop.rl.config import load_config
from emoloop.rl.objectives import load_objective
from emoloop.rl.online.objective import FlowGRPO, advantages, grpo_loss

nan = math.nan


def test_the_loss_and_its_gradient_are_the_clipped_formula() -> None:
    rng = np.random.default_rng(0)
    log_ratio, advantage, clip = rng.normal(0, 0.1, 64), rng.normal(0, 1, 64), 0.05
    ratio = np.exp(log_ratio)
    inside = np.minimum(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)
    # The gradient is A r where the unclipped part is the smaller, and nothing where the ratio is cut.
    slope = np.where(
        ratio * advantage <= np.clip(ratio, 1 - clip, 1 + clip) * advantage, -advantage * ratio, 0
    )
    x = torch.tensor(log_ratio, requires_grad=True)
    loss, told = grpo_loss(x, torch.tensor(advantage), clip)
    loss.backward()
    assert loss.item() == pytest.approx(-inside.mean(), abs=1e-12)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), slope / 64, atol=1e-12)
    np.testing.assert_allclose(told.numpy(), ratio)
    weighted, _ = grpo_loss(x, torch.tensor(advantage), clip, torch.full((64,), 3.0, dtype=torch.float64))
    assert weighted.item() == pytest.approx(-3 * inside.mean(), abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "all"])
def test_advantages_are_normalised_by_group_or_by_all_that_teach(scale: str) -> None:
    groups = [[1.0, 2.0, 4.0], [0.5, 0.5, 0.5], [None, 3.0, 1.0], [None, None, 2.0]]
    first, third = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0])
    spreads = (
        [first.std(), third.std()] if scale == "group" else [np.array([1.0, 2.0, 4.0, 3.0, 1.0]).std()] * 2
    )
    found = advantages(groups, scale)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[0], (first - first.mean()) / (spreads[0] + 1e-4), atol=1e-12)
    np.testing.assert_allclose(found[2], [nan, *((third - 2) / (spreads[1] + 1e-4))], atol=1e-12)
    assert np.isnan(found[1]).all() and np.isnan(found[3]).all()


def test_a_log_cannot_teach_what_needs_the_sampler() -> None:
    from emoloop.rl.distill import objective_of

    with pytest.raises(UserError, match=r"log_probability.*sampler logged it while generating"):
        objective_of(load_config("flow-grpo"))


def test_the_presets_take_what_they_collect() -> None:
    for preset in ("miniature", "sd35-medium", "flux-dev"):
        config = load_config("flow-grpo", preset)
        knobs = dict(config.objective)
        objective = load_objective(knobs.pop("name"), knobs)
        assert isinstance(objective, FlowGRPO)
        assert objective.rows == objective.updates * config.train.batch_size * config.train.accumulation
        assert (
            config.train.checkpoint_every % objective.updates == config.train.steps % objective.updates == 0
        )
