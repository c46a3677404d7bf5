"""Supervised fine-tuning on the best image of each run: the control.

    L = E || v_θ(x_t, t | neutral, target) - v(x_0, ε) ||²

It has no negatives and no gate. DiffusionNFT's authors report that such positive-only tuning collapses; it is
here so that a table can show what the others add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Batch, Metrics, Objective

if TYPE_CHECKING:
    from ..policy import Policy


class SFT(Objective):
    """Regression on winners."""

    @property
    def required_keys(self) -> frozenset[str]:
        """The winning image."""
        return frozenset({"prompt", "target", "winner"})

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        errors, hold = self.regress(batch, "winner", policy, generator)
        error = errors.mean()
        return error + hold, {"error": error.item(), "hold": hold.item()}
