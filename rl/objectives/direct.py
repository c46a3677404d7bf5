"""Direct reward: the gradient of the critic's own numbers, through its vision and the decoder, into the LoRA.

    L = -E[ R(augmented pictures) ] + λ || v_θ(x_t, t) - sg v_off(x_t, t) ||²  +  hold

R is `rl/differentiable.py`'s, v_off the student with its LoRA switched off. How the gradient reaches the LoRA (`way`):

    drtune        the student samples; the denoiser takes each state as a constant, and so each trained step adds its
                  own part to the picture without a chain through the others (DRTune, Wu et al., arXiv 2405.00760)
    draft         the student samples; the last steps, chained (DRaFT-K, Clark et al., arXiv 2309.17400)
    alignprop     the same, of a number of last steps that is drawn (AlignProp, Prabhudesai et al., arXiv 2310.03739)
    direct_align  no sampling: a logged picture gets known noise, the student goes one step, and the rest of the noise
                  is taken out as it was put in (Direct-Align of SRPO, Shen et al., arXiv 2509.06942)

A critic with a gradient is hacked sooner than it is pleased: its patches show as a grid on every picture. So the critic
sees cropped, shifted and noisy pictures, late steps (which paint texture) are not trained, several critics may have to
agree, and the guards watch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...domain import UserError
from ..differentiable import Reward, critic_reward, custom_reward
from .base import Batch, Metrics, Objective, normal_like, per_row

if TYPE_CHECKING:
    from ..policy import Policy, State

Pixels = Annotated[int, Field(ge=1)]

#: Whether a way takes the states as constants, and whether its steps are the last ones and their number is drawn.
WAYS = {"drtune": (True, False, False), "draft": (False, True, False), "alignprop": (False, True, True)}


class Direct(Objective):
    """Reward by gradient."""

    way: Literal["drtune", "draft", "alignprop", "direct_align"] = "drtune"
    """How the gradient reaches the weights; see above."""
    critics: tuple[str, ...] = ()
    """LVLMs in process (presets, folders, hub ids) whose mean reward counts: several, or several checkpoints of one,
    are harder to hack."""
    reward: str | None = None
    """Dotted path of another reward, `(pictures, prompts, targets) -> rewards`, beside the critics or alone."""
    prompt: str = "score"
    """Prompt file of the critics' score mode, whose gradient it is."""
    critique: str | None = None
    """Prompt file of their full critique, which then gives the value: a third less error, twice the time."""
    size: tuple[Pixels, Pixels] | None = None
    """(height, width) of what the critics see; None is the picture's own."""
    rollout_steps: int | None = Field(default=None, ge=1)
    """Sampler steps; None takes the model's default."""
    guidance: float | None = Field(default=1.0, ge=0)
    """Guidance of the student's own sampling; None takes the model's."""
    trained: int = Field(default=4, ge=1)
    """Steps with gradient."""
    early: float = Field(default=0.75, gt=0, le=1)
    """Share of the steps, from the noisy end, that drtune and direct_align train: late ones paint texture."""
    kl_weight: float = Field(default=0.3, ge=0)
    """λ."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Least share of a side that the critics see; drawn between this and 1."""
    shift: float = Field(default=0.0, ge=0)
    """Pixels by which the picture is moved at most before they see it."""
    pixel_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on pixels in [0, 1]."""
    latent_noise: float = Field(default=0.0, ge=0)
    """The same on latents in front of the decoder; drawn between 0 and this."""

    @property
    def judges(self) -> tuple[str, ...]:
        """The critics, and the reward."""
        return (*self.critics, *([self.reward] if self.reward else []))

    @property
    def required_keys(self) -> frozenset[str]:
        """Prompts and wishes; a picture for `direct_align`.

        Raises:
            UserError: No reward.
        """
        if not self.judges:
            raise UserError(
                "direct needs a reward with a gradient: set objective.critics=[MODEL] or objective.reward=PATH"
            )
        keys = {"prompt", "text", "target"}
        return frozenset(keys | {"winner"} if self.way == "direct_align" else keys)

    def loss(self, batch: Batch, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """See the module's formula."""
        if self.way == "direct_align":
            clean, states = self._restored(batch, policy, generator)
        else:
            clean, states = self._sampled(batch, policy, generator)
        pictures = (policy.network.pixels(self._noisy(clean, generator)) / 2 + 0.5).clamp(0, 1)
        pictures = self._moved(pictures, generator)
        rewards = [reward(pictures, batch["text"], batch["target"]) for reward in self._rewards(policy)]
        reward = torch.stack(rewards).mean(0).mean()
        prompt, target = batch["prompt"], batch["target"]
        kl, hold = reward.new_zeros(()), reward.new_zeros(())
        if self.kl_weight:
            kl = torch.stack([
                per_row(said - policy.switched_off(x, t, prompt, target)).mean() for x, t, said in states
            ]).mean()  # fmt: skip
        if states:
            hold = self.hold(*states[0][:2], policy)
        figures = {"reward": reward, "kl": kl, "hold": hold}
        return self.kl_weight * kl + hold - reward, {name: value.item() for name, value in figures.items()}

    def _sampled(
        self, batch: Batch, policy: Policy, generator: torch.Generator
    ) -> tuple[Tensor, list[State]]:
        prompt, target = batch["prompt"], batch["target"]
        steps = self.rollout_steps or policy.steps
        detach, last, drawn = WAYS[self.way]
        count = min(self.trained, steps)
        if drawn:
            count = int(torch.randint(1, count + 1, (), generator=generator))
        among = torch.arange(steps - count, steps) if last else self._early(steps)
        chosen = among[torch.randperm(len(among), generator=generator)[:count]].tolist()
        noise = torch.randn(len(target), *policy.latent_shape, generator=generator).to(target.device)
        return policy.path(
            noise, prompt, target, set(chosen), detach=detach, steps=steps, guidance=self.guidance
        )

    def _restored(
        self, batch: Batch, policy: Policy, generator: torch.Generator
    ) -> tuple[Tensor, list[State]]:
        """A logged picture after known noise, a step of the student, and the rest of that noise taken out."""
        clean, process = batch["winner"], policy.process
        noise, n = normal_like(clean, generator), len(clean)
        steps = self.rollout_steps or policy.steps
        times = process.schedule(steps, policy.network.image_tokens(policy.latent_shape))
        among = self._early(steps)
        place = int(among[torch.randint(len(among), (), generator=generator)])
        t, after = times[place], times[place + 1]
        x, at = process.add_noise(clean, noise, t.expand(n)), t.expand(n).to(clean.device)
        said = policy.student(x, at, batch["prompt"], batch["target"])
        there = process.step(x, said.to(x), t, after)
        zero, later = torch.zeros_like(clean), after.expand(n)
        left, kept = process.add_noise(zero, noise, later), process.add_noise(zero + 1, zero, later)
        return (there - left) / kept, [(x, at, said)]

    def _early(self, steps: int) -> Tensor:
        # The last step ends in the picture: nothing is left to take out.
        return torch.arange(max(1, min(steps - 1, round(self.early * steps))))

    def _noisy(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        if not self.latent_noise:
            return clean
        share = torch.rand(len(clean), 1, 1, 1, generator=generator).to(clean)
        return clean + self.latent_noise * share * normal_like(clean, generator)

    def _moved(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Cropped and shifted between pixels, what lies beyond the edge mirrored; then noise."""
        n, size = len(pictures), torch.tensor(pictures.shape[:1:-1], dtype=torch.float32)
        if self.crop < 1 or self.shift:
            share = 1 - (1 - self.crop) * torch.rand(n, 1, generator=generator)
            room = 1 - share + 2 * self.shift / size
            affine = torch.zeros(n, 2, 3)
            affine[:, 0, 0] = affine[:, 1, 1] = share[:, 0]
            affine[:, :, 2] = room * (2 * torch.rand(n, 2, generator=generator) - 1)
            grid = F.affine_grid(affine.to(pictures), list(pictures.shape), align_corners=False)
            pictures = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
        if self.pixel_noise:
            pictures = (pictures + self.pixel_noise * normal_like(pictures, generator)).clamp(0, 1)
        return pictures

    def _rewards(self, policy: Policy) -> list[Reward]:
        device = policy.device.type
        found: list[Reward] = [
            critic_reward(model, self.prompt, self.critique, self.size, device) for model in self.critics
        ]
        return found + ([custom_reward(self.reward)] if self.reward else [])
