"""TRL's GRPO with what its defaults get wrong for a critic put right.

Rewards that are missing move no advantage (`rewards.neutral`); before the first step the log-probabilities that the
trainer computes are held against those that the sampler saw (their ratio is 1, or batching, padding or pictures differ
between the two); a loss that is no number ends the training at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from .data import Sample, question
from .policy import CriticPolicy, check_loss
from .rewards import TaskReward, neutral, read_answer

#: Largest |log ratio| of sampler and trainer, by precision.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.3}


def as_dataset(policy: CriticPolicy, samples: Sequence[Sample]) -> Dataset:
    """TRL's rows: `prompt` with the picture in its place, and `place`, the number of the sample."""
    size = policy.config.data.size

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [samples[place] for place in batch["place"]]
        return {
            "prompt": [question(it, policy.prompt, it.picture(size)) for it in chosen],
            "place": batch["place"],
        }

    return Dataset.from_dict({"place": range(len(samples))}).with_transform(rows)


def as_rewards(tasks: Sequence[tuple[str, float, TaskReward]], samples: Sequence[Sample]) -> list[Any]:
    """The tasks as TRL calls them."""

    def made(name: str, reward: TaskReward) -> Callable[..., list[float | None]]:
        def call(completions: list[Any], place: list[int], **_: Any) -> list[float | None]:
            texts = [said[0]["content"] for said in completions]
            return [reward(read_answer(text), samples[at]) for text, at in zip(texts, place, strict=True)]

        call.__name__ = name
        return call

    return [made(name, reward) for name, _, reward in tasks]


class CriticTrainer(GRPOTrainer):
    """See the module's text; the arguments are those of TRL's trainer."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        group: Any = self.num_generations
        return neutral(super()._calculate_rewards(*args), group)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One backward pass."""
        loss = super().training_step(*args, **kwargs)
        check_loss(loss, self.state.global_step, "grpo")
        return loss

    @torch.no_grad()
    def log_ratio(self, policy: CriticPolicy, samples: Sequence[Sample], tokens: int = 32) -> float:
        """Largest |log p(trainer) − log p(sampler)| over the first tokens of some answers."""
        model: Any = policy.model
        model.eval()
        inputs = policy.inputs(samples)
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=self.temperature,
            top_k=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        said = out.sequences[:, inputs["input_ids"].shape[1] :]
        scale = torch.stack(out.logits, 1).float() / self.temperature
        sampled = scale.log_softmax(-1).gather(-1, said[..., None])[..., 0]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1)
        pictures = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in pictures:
                pictures[key] = torch.cat([pictures[key], torch.zeros_like(said)], 1)
        trained, _, _ = self._get_per_token_logps_and_entropies(
            model, out.sequences, mask, said.shape[1], num_images=[1] * len(samples), **pictures
        )
        model.train()
        return float((trained - sampled).abs().max())
