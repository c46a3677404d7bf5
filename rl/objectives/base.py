"""What an objective is: knobs, the batch keys it needs, and a loss made of calls to the policy.

An objective holds no weights and no state. It asks the policy for predictions of its voices (`student`, `reference`,
`slow`), for states (`rollout`), and for `process` and `null`, the noise process and the negative prompt. Everything
random comes from the generator it is handed, so a step can be computed again. To add one: subclass `Objective` in a
file of your own and name it by a dotted path (`emoloop distill my_pkg.my_mod:MyObjective`).

Batch keys (B rows, one for each example):

    prompt     Conditioning of the neutral prompt
    text       the neutral prompts themselves, a list
    refined    Conditioning of the prompt that the loop found
    added      the same with the rows in the order of `Family.added_last`
    target     (B, 2) wanted valence and arousal, NaN where an axis does not matter
    advantage  (B,) gain of the refined prompt, from images that were not selected
    phrase     (B,) place in the phrasebook of what the refined prompt adds, int64
    winner     (B, C, H, W) latent of the preferred image
    loser      (B, C, H, W) latent of the other image
    latents    (B, C, H, W) latent of one image of a group
    reward     (B,) its reward
    rewards    (B, G) the rewards of its whole group, NaN where the group is smaller
    number     (B,) the example's own number in the dataset, int64
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...tools.diffusion.families import Conditioning
from ...tools.diffusion.process import TimeSampling

if TYPE_CHECKING:
    from ..policy import Policy

Batch = Mapping[str, Any]
Metrics = dict[str, float]


class Objective(BaseModel, ABC):
    """Base of all objectives; its fields are its knobs (`--set objective.NAME=VALUE`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    hold_fraction: float = Field(default=0.15, ge=0, le=1)
    """Share of rows, added to each batch, that hold the answer to the negative prompt at the reference:
    guidance subtracts that answer, so letting it drift spoils every image."""
    hold_weight: float = Field(default=1.0, ge=0)
    """Weight of those rows."""
    time_sampling: TimeSampling = "logit_normal"
    """How training times are drawn: "logit_normal", "uniform" or "steps" (of a sampler)."""

    @property
    @abstractmethod
    def required_keys(self) -> frozenset[str]:
        """Batch keys that `loss` reads."""

    @abstractmethod
    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """The scalar loss of one batch and figures worth logging."""

    @property
    def judges(self) -> tuple[str, ...]:
        """Models that reward while training, beside those of the log: an evaluation takes none for its judge."""
        return ()

    def slow_decay(self, step: int) -> float | None:
        """Decay of the policy's moving average after optimizer step `step`; None where none is needed."""
        return None

    def draw_states(
        self, batch: Batch, key: str, policy: Policy, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise `batch[key]`: (x_t, t, noise), each a row per example."""
        clean = batch[key]
        t = policy.process.draw(len(clean), generator, self.time_sampling).to(clean.device)
        noise = normal_like(clean, generator)
        return policy.process.add_noise(clean, noise, t), t, noise

    def regress(
        self, batch: Batch, key: str, policy: Policy, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The student's errors (B,) on noised `batch[key]` under the neutral prompts, and the hold loss."""
        x, t, noise = self.draw_states(batch, key, policy, generator)
        wanted = policy.process.regression_target(batch[key], noise, t)
        student, hold = self.with_hold(x, t, batch["prompt"], batch["target"], policy)
        return per_row(student - wanted), hold

    def with_hold(
        self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor, policy: Policy
    ) -> tuple[Tensor, Tensor]:
        """Student prediction for the rows, and the loss of the held rows, in one forward pass.

        Returns:
            (prediction of the given rows, scalar hold loss already weighted).
        """
        held = self._held(x)
        if not held:
            return policy.student(x, t, condition, target), x.new_zeros(())
        null, nothing = policy.null.expand(held), no_target(held, x.device)
        both = Conditioning.cat([condition, null])
        out = policy.student(
            torch.cat([x, x[:held]]), torch.cat([t, t[:held]]), both, torch.cat([target, nothing])
        )
        drift = per_row(out[len(x) :] - policy.reference(x[:held], t[:held], null, nothing)).mean()
        return out[: len(x)], self.hold_weight * self.hold_fraction * drift

    def hold(self, x: Tensor, t: Tensor, policy: Policy) -> Tensor:
        """The loss of the held rows alone, weighted; x and t as for `with_hold`."""
        held = self._held(x)
        if not held:
            return x.new_zeros(())
        null, nothing = policy.null.expand(held), no_target(held, x.device)
        at = (x[:held], t[:held], null, nothing)
        return (
            self.hold_weight
            * self.hold_fraction
            * per_row(policy.student(*at) - policy.reference(*at)).mean()
        )

    def _held(self, x: Tensor) -> int:
        return round(self.hold_fraction * len(x)) if self.hold_weight else 0


def per_row(error: Tensor) -> Tensor:
    """Mean square over all but the first dimension, at least in float32: (B, …) → (B,)."""
    error = error if error.dtype == torch.float64 else error.float()
    return error.square().flatten(1).mean(1)


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal of x's shape, drawn on the CPU so that a seed means the same everywhere."""
    return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)


def no_target(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Targets that ask for nothing: they stand for the null tokens."""
    return torch.full((n, 2), torch.nan, device=device)
