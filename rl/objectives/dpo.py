"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), for epsilon, v and flow predictions alike.

With ℓ the mean squared error of a prediction, same noise and time for both images of a pair:

    L = -log σ( β/2 [ (ℓ_ref^w - ℓ_ref^l) - (ℓ_θ^w - ℓ_θ^l) ] )

β is the paper's and Flow-GRPO's. diffusers' script (`train_diffusion_dpo.py`) leaves the half out: a β of 2500 there
is 5000 here.

Nothing in the formula keeps ℓ_θ^w from rising as long as ℓ_θ^l rises faster. Diffusion-SDPO's safeguard scales the
loser's gradient by λ = clip((1 - μ) ||g_w||² / <g_w, g_l>, 0, 1) where the product of both gradients (of the errors, by
the predictions) is positive: to first order the winner's error then never rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics, Objective, normal_like, per_row

if TYPE_CHECKING:
    from ..policy import Policy


def dpo_loss(
    model_winner: Tensor, model_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> Tensor:
    """The formula above.

    Args:
        model_winner: (B,) errors of the student on the preferred images.
        model_loser: (B,) its errors on the others.
        reference_winner: (B,) errors of the reference, constants.
        reference_loser: (B,) the same on the others.
        beta: Strength; the larger, the closer to the reference.

    Returns:
        Scalar mean over the pairs.
    """
    logits = (reference_winner - reference_loser).detach() - (model_winner - model_loser)
    return -F.logsigmoid(beta / 2 * logits).mean()


def safeguarded(loser_error: Tensor, winner_off: Tensor, loser_off: Tensor, margin: float) -> Tensor:
    """The loser's errors as they are, with their gradient scaled by λ.

    Args:
        loser_error: (B,) errors of the student on the losers.
        winner_off: (B, …) its predictions minus the wanted ones on the winners, to which g_w is proportional.
        loser_off: (B, …) the same on the losers.
        margin: μ, in [0, 1].
    """
    winner, loser = (off.detach().flatten(1) for off in (winner_off, loser_off))
    product = (winner * loser).sum(1)
    share = ((1 - margin) * winner.square().sum(1) / product.clamp_min(1e-12)).clamp(0, 1)
    share = torch.where(product > 0, share, torch.ones_like(share))
    return share * loser_error + (1 - share) * loser_error.detach()


class DPO(Objective):
    """Preference pairs under the neutral prompt."""

    beta: float = Field(default=100.0, gt=0)
    """The paper's scale; 2000–5000 for epsilon models, 100 for flows (Flow-GRPO)."""
    safeguard: float | None = Field(default=None, ge=0, le=1)
    """μ of Diffusion-SDPO's scale of the loser's gradient; None leaves that as it is."""
    draws: int = Field(default=0, ge=0)
    """Noise and time of a pair come from so many fixed draws, and the reference's errors on them are
    remembered: from the second meeting on, the reference costs nothing. 0 draws afresh each time."""
    hold_fraction: float = Field(default=0.0, ge=0, le=1)
    """As `Objective.hold_fraction`; 0, since the pair's own reference holds the student already."""

    @property
    def required_keys(self) -> frozenset[str]:
        """Two images and what they were meant to show; a number to remember them by."""
        keys = {"prompt", "target", "winner", "loser"}
        return frozenset(keys | {"number"} if self.draws else keys)

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        winner, loser = batch["winner"], batch["loser"]
        names: list[tuple[int, int]] = []
        if self.draws:
            which = torch.randint(self.draws, (len(winner),), generator=generator)
            names = list(zip(batch["number"].tolist(), which.tolist(), strict=True))
            t, noise = self._fixed(names, winner, policy)
        else:
            _, t, noise = self.draw_states(batch, "winner", policy, generator)
        x = torch.cat([policy.process.add_noise(clean, noise, t) for clean in (winner, loser)])
        wanted = torch.cat([policy.process.regression_target(clean, noise, t) for clean in (winner, loser)])
        t, condition, target = t.repeat(2), batch["prompt"].repeat(2), batch["target"].repeat(2, 1)
        student, hold = self.with_hold(x, t, condition, target, policy)

        def reference(rows: Tensor) -> Tensor:
            both = torch.cat([rows, rows + len(winner)])
            said = policy.reference(x[both], t[both], condition[both], target[both])
            return per_row(said - wanted[both]).reshape(2, -1).T

        errors = policy.recall(names, reference) if names else reference(torch.arange(len(winner)))
        rw, rl = errors.to(x.device).T
        mw, ml = per_row(student - wanted).chunk(2)
        if self.safeguard is not None:
            winner_off, loser_off = (student - wanted).chunk(2)
            ml = safeguarded(ml, winner_off, loser_off, self.safeguard)
        loss = dpo_loss(mw, ml, rw, rl, self.beta)
        logits = ((rw - rl) - (mw - ml)).detach()
        return loss + hold, {
            "accuracy": ((logits > 0).float() + 0.5 * (logits == 0).float()).mean().item(),
            "margin": self.beta / 2 * logits.mean().item(),
            "winner_error": mw.mean().item(),
            "loser_error": ml.mean().item(),
            "hold": hold.item(),
        }

    def _fixed(self, names: list[tuple[int, int]], like: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """Time and noise that belong to (pair, draw) for good."""
        times, noises = [], []
        for pair, draw in names:
            own = torch.Generator().manual_seed(pair * 65_537 + draw)
            times.append(policy.process.draw(1, own, self.time_sampling))
            noises.append(normal_like(like[:1], own))
        return torch.cat(times).to(like.device), torch.cat(noises)
