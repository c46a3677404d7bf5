"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): policy gradients through the steps of an SDE sampler.

A group is several pictures of one prompt and target; A is a picture's reward, normalised within what was collected.
With r = p_θ(x'|x) / p_old(x'|x) for each step that was drawn with noise, and μ the mean of that step,

    L = E[ max(-A r, -A clip(r, 1 ± ε)) ] + β E[ ||μ_θ - μ_ref||² / 2 g² ],      g² = s² / |Δt|

means over a latent's dimensions, as the paper's code takes them; the second term is that code's KL (the Gaussians'
divergence times |Δt|), the reference is the network without the adapter in training. GRPO-Guard (arXiv 2510.22319)
takes the bias out of log r and gives all steps one scale:

    log r ← s (log r + ||μ_θ - μ_old||² / 2 s²),     and each row's part of the first term by 1 / |Δt|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ...domain import UserError
from ...tools.diffusion.process import Flow
from ...tools.diffusion.sde import SDE, SDEKind
from ..objectives.base import Batch, Metrics, Objective, per_row

if TYPE_CHECKING:
    from ..policy import Policy


def advantages(groups: Sequence[Sequence[float | None]], scale: Literal["group", "all"]) -> list[list[float]]:
    """(R - mean of its group) / standard deviation, as Flow-GRPO's tracker has it.

    Args:
        groups: The rewards of each group; None is missing.
        scale: Whose deviation divides: the group's own, or that of all rewards.

    Returns:
        By group and picture; NaN where nothing is to be learned: the reward is missing, alone, or the same in its
        whole group.
    """
    rows = [np.array([np.nan if it is None else it for it in group], dtype=np.float64) for group in groups]
    rows = [row if len(set(row[~np.isnan(row)])) > 1 else np.full_like(row, np.nan) for row in rows]
    known = np.concatenate([row[~np.isnan(row)] for row in rows]) if rows else np.empty(0)
    out = []
    for row in rows:
        own = row[~np.isnan(row)]
        spread = (own if scale == "group" else known).std() if len(own) else 1.0
        out.append(((row - (own.mean() if len(own) else 0.0)) / (spread + 1e-4)).tolist())
    return out


def grpo_loss(
    log_ratio: Tensor, advantage: Tensor, clip: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first term above.

    Args:
        log_ratio: (B,) log r.
        advantage: (B,) A.
        clip: ε.
        weight: (B,) of each row; None is 1.

    Returns:
        Its mean, and r (B,) without gradient.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return (loss if weight is None else loss * weight).mean(), ratio.detach()


class FlowGRPO(Objective):
    """Knobs of sampling and of the loss; what is sampled is collected by `collect.Collector`."""

    reward: str = "emotion"
    """As `loop.reward`: what the critic's full critique is worth; "emotion + 0.5*NAME" adds a guard of content."""
    groups: int = Field(default=8, ge=1)
    """Prompts in one collection."""
    group: int = Field(default=8, ge=2)
    """Pictures of each."""
    updates: int = Field(default=2, ge=1)
    """Optimizer steps on what was collected; the rows (groups · group · window) have to be as many as those steps take
    (updates · train.batch_size · train.accumulation)."""
    steps: int = Field(default=10, ge=2)
    """Sampler steps in training; `guard.steps` and whoever uses the adapter take the model's own number."""
    sampler: SDEKind = "flow"
    """"flow" (Flow-GRPO), "dance" (DanceGRPO) or "cps" (coefficient-preserving)."""
    noise_level: float = Field(default=0.7, gt=0)
    """Of the SDE; below 1 for "cps"."""
    window: int = Field(default=2, ge=1)
    """Steps that are drawn with noise and trained on; the rest follow the ODE (Flow-GRPO-Fast, MixGRPO)."""
    early: float = Field(default=0.5, gt=0, le=1)
    """Share of the steps, from the noisy end, in which the window lies; its place is drawn for each collection."""
    shared: bool = False
    """The pictures of a group have one initial noise, and the steps before the window are walked once for all."""
    clip: float = Field(default=1e-4, gt=0)
    """ε of the ratio."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Advantages are clipped to this."""
    scale: Literal["group", "all"] = "all"
    """Whose standard deviation divides the advantages: the group's, or that of all rewards collected."""
    kl: float = Field(default=0.01, ge=0)
    """β; 0 asks the reference nothing."""
    ratio_norm: bool = False
    """GRPO-Guard's normalised ratio."""
    patience: float = Field(default=1800.0, ge=0)
    """Seconds that training waits for a critic that has stopped to answer."""
    hold_fraction: float = Field(default=0.0, ge=0, le=1)
    """As `Objective.hold_fraction`; 0, since training runs without guidance."""

    @property
    def required_keys(self) -> frozenset[str]:
        """`step` (B,) its number, `state` and `after` (B, C, H, W) before and after it, `mean` of the Gaussian and
        `log_probability` (B,) under the policy that drew it, `advantage` (B,) of its picture."""
        return frozenset(
            {"prompt", "target", "step", "state", "after", "mean", "log_probability", "advantage"}
        )

    @property
    def rows(self) -> int:
        """Rows of one collection."""
        return self.groups * self.group * self.window

    def sde(self, policy: Policy) -> SDE:
        """The sampler for a policy.

        Raises:
            UserError: The model is no flow, or the window does not fit into the steps.
        """
        if not isinstance(policy.process, Flow):
            raise UserError("flow-grpo needs a flow model (SD3, FLUX): this one's process is a diffusion")
        if self.sampler == "cps" and self.noise_level >= 1:
            raise UserError("objective.noise_level: cps wants less than 1")
        if self.window > self.last:
            raise UserError(
                f"objective.window {self.window} does not fit into the first {self.last} of {self.steps} steps "
                "(objective.early; the last step is never drawn with noise)"
            )
        times = policy.process.schedule(self.steps, policy.network.image_tokens(policy.latent_shape))
        return SDE(times, self.sampler, self.noise_level)

    @property
    def last(self) -> int:
        """The step before which a window ends; the last step's noise would stay in the picture."""
        return min(self.steps - 1, max(1, round(self.early * self.steps)))

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        sde, step, x = self.sde(policy), batch["step"].cpu(), batch["state"]
        t = sde.times[step].to(x)
        velocity, hold = self.with_hold(x, t, batch["prompt"], batch["target"], policy)
        mean = sde.mean(x, velocity, step)
        log_ratio = sde.log_prob(batch["after"], mean, step) - batch["log_probability"]
        deviation, elapsed = (it[step].to(x) for it in (sde.deviation, sde.elapsed))
        weight = None
        if self.ratio_norm:
            bias = per_row(mean - batch["mean"]) / (2 * deviation.square())
            log_ratio, weight = deviation * (log_ratio + bias), 1 / elapsed
        advantage = batch["advantage"].to(x).clamp(-self.advantage_clip, self.advantage_clip)
        loss, ratio = grpo_loss(log_ratio, advantage, self.clip, weight)
        figures = {
            "ratio": ratio.mean().item(),
            "ratio_apart": (ratio - 1).abs().max().item(),
            "clipped": ((ratio - 1).abs() > self.clip).float().mean().item(),
            "hold": hold.item(),
        }
        if self.kl:
            reference = sde.mean(x, policy.reference(x, t, batch["prompt"], batch["target"]), step)
            divergence = (per_row(mean - reference) * elapsed / (2 * deviation.square())).mean()
            loss, figures["kl"] = loss + self.kl * divergence, divergence.item()
        return loss + hold, figures
