"""On-policy distillation of the loop.

The teacher is the reference under the prompt that the loop found, the student the model in training under
the neutral prompt and the target; they are compared on states of the student's own guided sampling:

    L = E[ clip(A, 0, A_max) || v_student(x_t, t | neutral, target) - sg v_teacher(x_t, t | refined) ||²]

A is the mean reward of the refined prompt's images minus that of the neutral prompt's, counted on images that
selected nothing, so that a revision is imitated only as far as it beat the unaided attempt. That baseline is
RLTF-SD's (arXiv 2602.02482), the on-policy velocity match D-OPSD's (arXiv 2605.05204). Both sides are
conditional predictions: guidance stays a choice of sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Batch, Metrics, Objective, per_row

if TYPE_CHECKING:
    from ..policy import Policy


def opd_loss(student: Tensor, teacher: Tensor, advantage: Tensor, a_max: float) -> Tensor:
    """The formula above for given predictions.

    Args:
        student: (N, …) predictions with gradient.
        teacher: (N, …) predictions; taken as constants.
        advantage: (N,) gains.
        a_max: Upper end of the clip, above 0.

    Returns:
        Scalar; rows with a gain of 0 or less contribute nothing but still count in the mean.
    """
    return (advantage.clamp(0, a_max) * per_row(student - teacher.detach())).mean()


class OPD(Objective):
    """Loop distillation on the student's own states."""

    a_max: float = Field(default=1.0, gt=0)
    """Gains above this count as this, so that a few lucky runs don't rule."""
    states: int = Field(default=3, ge=1)
    """States used from each rollout."""
    rollout_steps: int | None = Field(default=None, ge=1)
    """Sampler steps of a rollout; None takes the model's default."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance of a rollout; None takes the model's default."""
    on_policy: float = Field(default=1.0, ge=0, le=1)
    """Share of batches that use the student's own states; the rest use noised images of the winning
    round, which cost no rollout and lie where the teacher's own images lie."""
    early: float = Field(default=1.0, gt=0, le=1)
    """Share of a rollout's steps, from the noisy end, whose states are used. One neutral prompt and
    target stand for many refined prompts, and on a state that shows what kind of image it is becoming
    only those are right that would make it so: the others pull it towards an average. Early states show
    nothing yet; later ones are better taken from logged images of the very prompt (`on_policy` below
    1)."""
    late: float = Field(default=1.0, gt=0, le=1)
    """Share of its steps, from the clean end, likewise (DanceOPD takes one state of low noise)."""
    space: Literal["velocity", "clean"] = "velocity"
    """"velocity" weighs all times alike; "clean" compares the implied clean images (w = t²)."""
    teacher: Literal["reference", "slow"] = "reference"
    """"reference" is what made the traces; "slow" is the student's own moving average, which hears the
    refined prompt beside the target and so may pass the reference."""
    teacher_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of that average."""

    @property
    def required_keys(self) -> frozenset[str]:
        """Prompts and gains are enough; images only where logged states are wanted."""
        keys = {"prompt", "refined", "target", "advantage"}
        return frozenset(keys if self.on_policy == 1 else keys | {"latents"})

    def slow_decay(self, step: int) -> float | None:
        """Only the "slow" teacher needs an average."""
        return self.teacher_decay if self.teacher == "slow" else None

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        prompt, target = batch["prompt"], batch["target"]
        own = self.on_policy == 1 or torch.rand((), generator=generator).item() < self.on_policy
        if own:
            x, t = policy.rollout(
                prompt, target, steps=self.rollout_steps, guidance=self.guidance, generator=generator,
                keep=self.states, early=self.early, late=self.late,
            )  # fmt: skip
        else:
            parts = [self.draw_states(batch, "latents", policy, generator)[:2] for _ in range(self.states)]
            x, t = (torch.cat(part) for part in zip(*parts, strict=True))
        # Fewer than asked for where the sampler has fewer steps.
        k = len(x) // len(prompt)
        refined, target = batch["refined"].repeat(k), target.repeat(k, 1)
        teacher = (policy.slow if self.teacher == "slow" else policy.reference)(x, t, refined, target)
        student, hold = self.with_hold(x, t, prompt.repeat(k), target, policy)
        advantage = batch["advantage"].repeat(k)
        if self.space == "clean":
            student, teacher = (policy.process.clean(x, v, t) for v in (student, teacher))
        imitation = opd_loss(student, teacher, advantage, self.a_max)
        with torch.no_grad():
            gap = per_row(student - teacher).mean()
        gate = advantage.clamp(0, self.a_max).mean()
        figures = {"imitation": imitation, "hold": hold, "gap": gap, "gate": gate}
        return imitation + hold, {name: value.item() for name, value in figures.items()}
