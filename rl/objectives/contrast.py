"""Condition-contrast DPO: one picture under the right emotion against the same picture under a wrong one.

One reading of Emotion-Director's "DPO with a negative visual prompt" (arXiv 2512.19479), whose loss was not found.
With ℓ the error of a prediction on the preferred picture x, same noise and time, e⁺ its emotion and e⁻ another one:

    L = -log σ( -β [ (ℓ_θ(x, e⁺) - ℓ_ref(x)) - (ℓ_θ(x, e⁻) - ℓ_ref(x)) ] ) + γ ℓ_θ(x, e⁺)

A reference that knows no emotion says the same to both, so only the difference of the student's two predictions is
left. That alone could be widened by forgetting how to draw under e⁻; the second term (γ) holds the right side. The
wrong emotion is that of another row of the batch; emotion tokens and visual prompts both hear it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics, Objective, per_row

if TYPE_CHECKING:
    from ..policy import Policy


class Contrast(Objective):
    """Right against wrong emotion on one picture."""

    beta: float = Field(default=100.0, gt=0)
    """Strength, on the scale of `dpo`."""
    anchor: float = Field(default=1.0, ge=0)
    """γ: weight of plain regression under the right emotion."""
    apart: float = Field(default=1.0, ge=0)
    """Points on one axis, at least, by which a wrong emotion differs; rows that find none count for γ alone."""

    @property
    def required_keys(self) -> frozenset[str]:
        """The best picture, and what it was meant to show."""
        return frozenset({"prompt", "target", "winner"})

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        right = batch["target"]
        wrong, differs = other(right, self.apart)
        x, t, noise = self.draw_states(batch, "winner", policy, generator)
        wanted = policy.process.regression_target(batch["winner"], noise, t)
        x, t, wanted = (torch.cat([it, it]) for it in (x, t, wanted))
        condition, target = batch["prompt"].repeat(2), torch.cat([right, wrong])
        student, hold = self.with_hold(x, t, condition, target, policy)
        plus, minus = per_row(student - wanted).chunk(2)
        with torch.no_grad():
            base = per_row(policy.reference(x, t, condition, target) - wanted)
        before = base.chunk(2)[0] - base.chunk(2)[1]
        gap = (plus - minus) - before
        counted = differs.to(gap)
        contrast = (-F.logsigmoid(-self.beta * gap) * counted).sum() / counted.sum().clamp(min=1)
        return contrast + self.anchor * plus.mean() + hold, {
            "contrast": contrast.item(),
            "accuracy": ((gap.detach() < 0).to(gap) * counted).sum().item() / max(1.0, counted.sum().item()),
            "error": plus.mean().item(),
            "wrong_error": minus.mean().item(),
            "hold": hold.item(),
        }


def other(target: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """For each row the target of another one that differs from it, the next such in turn.

    Args:
        target: (B, 2) valence and arousal, NaN where an axis does not matter.
        apart: Points by which one of the axes that both want has to differ.

    Returns:
        (B, 2) targets, a row's own where no other differs, and (B,) whether one does.
    """
    far = (target[:, None] - target[None]).abs().nan_to_num(0.0).amax(-1) >= max(apart, 1e-6)
    rows = torch.arange(len(target), device=target.device)
    turn = (rows[None] - rows[:, None]) % len(target)
    order = torch.where(far, turn, torch.full_like(turn, len(target)))
    chosen = torch.where(far.any(1), order.argmin(1), rows)
    return target[chosen], far.any(1)
