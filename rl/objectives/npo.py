"""Diffusion-NPO (Wang et al., arXiv 2505.11245): a model of reversed preferences for the negative branch of guidance.

Guidance steers away from the negative branch, so that what stands there should be what people don't want, and not only
what nobody asked for. It is Diffusion-DPO with winner and loser swapped, under the negative branch's own text ∅:

    L = -log σ( β/2 [ (ℓ_ref^l - ℓ_ref^w) - (ℓ_θ^l - ℓ_θ^w) ] ),    ℓ = || prediction(x_t, ∅, e) - wanted ||²

The paper trains under the prompts and drops a share of them; here the text is always dropped, since ∅ is all that the
branch is asked at, and the wanted emotion e is told, so that what is steered away from is what is wrong for this wish.
Sampling by it: `tools/diffusion/negative.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics
from .dpo import DPO

if TYPE_CHECKING:
    from ..policy import Policy


class NPO(DPO):
    """Preference pairs reversed, under the negative prompt."""

    hold_fraction: float = Field(default=0.0, ge=0, le=1)
    """As elsewhere; none by default, since it is the answer to the negative prompt that is to change."""

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula; `winner_error` is that of what people like less."""
        prompt = policy.null.expand(len(batch["winner"]))
        swapped = {"prompt": prompt, "winner": batch["loser"], "loser": batch["winner"]}
        return super().loss({**batch, **swapped}, policy, generator)
