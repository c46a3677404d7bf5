"""An objective of your own in one file, trained for two steps on a small log."""

from typing import Any

import torch
from emoloop import EmotionTarget, distill, open_loop
from emoloop.rl.objectives.base import Batch, Metrics, Objective, per_row
from pydantic import Field
from torch import Tensor


class Threshold(Objective):
    """Regression on the images of a run whose reward is above a threshold.

    L = E[ [r > θ] · || v_θ(x_t, t | neutral, target) - v(x_0, ε) ||² ]
    """

    # A field is a knob: `--set objective.threshold=0.2`, with its limits checked before training.
    threshold: float = Field(default=0.0)

    @property
    def required_keys(self) -> frozenset[str]:
        """What `loss` reads; the log's examples are chosen by it."""
        return frozenset({"prompt", "target", "latents", "reward"})

    def loss(self, batch: Batch, policy: Any, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """One batch. The policy predicts as student and as reference; all randomness comes from `generator`."""
        x, t, noise = self.draw_states(batch, "latents", policy, generator)
        wanted = policy.process.regression_target(batch["latents"], noise, t)
        # Held rows keep the answer to the negative prompt where it was; see `Objective.hold_fraction`.
        student, hold = self.with_hold(x, t, batch["prompt"], batch["target"], policy)
        chosen = (batch["reward"] > self.threshold).float()
        loss = (chosen * per_row(student - wanted)).mean() + hold
        return loss, {"chosen": chosen.mean().item()}


if __name__ == "__main__":
    # What is learned from are several pictures of each neutral prompt.
    with open_loop(loop={"rounds": 1, "images": 3, "neutral_images": 3}) as loop:
        for seed, prompt in enumerate(["a dog by the sea", "a cat in the city", "a fox", "a boat"]):
            loop.run_sync(prompt, EmotionTarget(valence=2, arousal=-1), seed=seed)

    # The same on the command line: `emoloop distill my_objective:Threshold --out adapter --set train.steps=2`
    done = distill("my_objective:Threshold", "adapter", knobs={"train.steps": 2, "objective.threshold": 0.2})
    print(done.outcome.reason, done.folder, done.figures)
