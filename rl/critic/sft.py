"""The supervised start: the model learns to give answers in which the labels stand.

GRPO lets a model choose among what it says already; a model that is wrong in the same way each time gives groups
without spread, and nothing to choose. Here it is told. What the data do not say of an answer (analysis, suggestion) the
model says itself, so that only the labelled fields pull it anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ...agents.schemas import CRITIC_SCHEMA
from .data import Sample
from .policy import CriticPolicy, check_loss
from .rewards import read_answer

_FIELDS = tuple(CRITIC_SCHEMA["properties"])


def complete(policy: CriticPolicy, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    """(picture, answer to learn) of each; one without a full answer takes the rest from the model's own.

    Pictures that the model cannot answer readably, and that the data do not answer wholly, are left out.
    """
    partial = [sample for sample in samples if not set(_FIELDS) <= set(sample.labels)]
    own = dict(zip((id(sample) for sample in partial), policy.answers(partial), strict=True))
    found = []
    for sample in samples:
        answer = sample.labels
        if id(sample) in own:
            said = read_answer(own[id(sample)])
            if said is None:
                continue
            answer = {**json.loads(own[id(sample)]), **answer}
        found.append((sample, json.dumps({key: str(answer[key]) for key in _FIELDS})))
    return found


class Collate:
    """(picture, answer) pairs as inputs and labels; what is not the answer has the label -100."""

    def __init__(self, policy: CriticPolicy) -> None:
        self._policy = policy

    def __call__(self, pairs: list[tuple[Sample, str]]) -> dict[str, Tensor]:
        """Inputs of the model and `labels`, (batch, length)."""
        samples, answers = zip(*pairs, strict=True)
        inputs = self._policy.inputs(samples, answers)
        tokenizer = self._policy.processor.tokenizer
        ids = tokenizer(
            [f"{answer}{tokenizer.eos_token}" for answer in answers], add_special_tokens=False
        ).input_ids
        labels = torch.full_like(inputs["input_ids"], -100)
        # Padding stands on the left: each answer ends its row.
        for row, answer in enumerate(ids):
            labels[row, -len(answer) :] = inputs["input_ids"][row, -len(answer) :]
        return {**inputs, "labels": labels}


class SFTrainer(Trainer):
    """transformers' trainer with a loss in which the characters of numbers may weigh more.

    Args:
        policy: What learns.
        score_weight: Their weight.
        **kwargs: Of transformers' `Trainer`.
    """

    def __init__(self, policy: CriticPolicy, score_weight: float, **kwargs: Any) -> None:
        tokenizer = policy.processor.tokenizer
        size = policy.model.get_output_embeddings().weight.shape[0]
        self._weight = torch.ones(size, device=policy.model.device)
        marks = [tokenizer.convert_tokens_to_ids(mark) for mark in "0123456789+-"]
        self._weight[[mark for mark in marks if mark is not None and mark != tokenizer.unk_token_id]] = (
            score_weight
        )
        super().__init__(model=policy.model, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted cross-entropy of the answers' tokens, a mean over the batch."""
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        told = labels[:, 1:] != -100
        loss = F.cross_entropy(logits[told].float(), labels[:, 1:][told], weight=self._weight)
        check_loss(loss, self.state.global_step, "sft")
        return (loss, {"logits": logits}) if return_outputs else loss
