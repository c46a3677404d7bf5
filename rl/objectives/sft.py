"""Supervised fine-tuning on the best image of each run: the control.

    L = E || v_θ(x_t, t | neutral, target) - v(x_0, ε) ||²

It has no negatives and no gate. DiffusionNFT's authors report that such positive-only tuning collapses; it is
here so that a table can show what the others add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Batch, Metrics, Objective, PolicyView, per_row


class SFT(Objective):
    """Regression on winners."""

    @property
    def required_keys(self) -> frozenset[str]:
        """The winning image."""
        return frozenset({"prompt", "target", "winner"})

    def loss(self, batch: Batch, policy: PolicyView, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        x, t, noise = self.draw_states(batch, "winner", policy, generator)
        wanted = policy.process.regression_target(batch["winner"], noise, t)
        student, hold = self.with_hold(x, t, batch["prompt"], batch["target"], policy)
        error = per_row(student - wanted).mean()
        return error + hold, {"error": error.item(), "hold": hold.item()}
