"""The first start: a picture of the generator's kind is to look as a clean picture of the same content looked.

A critic that reads clean pictures well reads generated ones badly for one reason: its vision gives it something else.
Where the data have a clean counterpart (`clean`: the picture from which a noised and denoised one was made), the vision
tower in training learns to give for the one what it gave for the other before training, token by token. Pictures
without a counterpart are their own: what they look like must stay. That is one pass of the tower and no text, so it
sees many more pictures a second than answers do; and no label is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ...domain import UserError
from .data import Sample
from .policy import CriticPolicy, check_loss

#: So many pictures with a counterpart come with one without.
_SHARE = 4


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """The pictures that teach: those with a clean counterpart, and some without.

    Raises:
        UserError: None has one.
    """
    noisy = [sample for sample in samples if sample.clean is not None]
    if not noisy:
        raise UserError("match.steps: no picture has a clean counterpart (column `clean`): set match.steps=0")
    return noisy + [sample for sample in samples if sample.clean is None][: len(noisy) // _SHARE]


class Matcher(Trainer):
    """transformers' trainer with the squared distance of two sets of image tokens, in their deviations.

    Args:
        policy: What learns.
        **kwargs: Of transformers' `Trainer`; rows are samples.
    """

    def __init__(self, policy: CriticPolicy, **kwargs: Any) -> None:
        self._before = copy.deepcopy(policy.model).eval().requires_grad_(False)
        self._policy = policy
        super().__init__(model=policy.model, data_collator=self._collate, **kwargs)

    def _collate(self, samples: list[Sample]) -> dict[str, Any]:
        size, processor = self._policy.config.data.size, self._policy.processor.image_processor

        def made(pictures: list[Any]) -> Any:
            return processor([[picture] for picture in pictures], return_tensors="pt")

        shown = made([sample.picture(size) for sample in samples])
        return {"shown": shown, "clean": made([sample.picture(size, clean=True) for sample in samples])}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean squared distance, each channel in its own deviation over the batch."""
        with torch.no_grad():
            wanted = _tokens(self._before, inputs["clean"])
        given = _tokens(self._policy.model, inputs["shown"])
        loss = ((given - wanted) / (wanted.std(0) + 1e-6)).square().mean()
        check_loss(loss, self.state.global_step, "match")
        return (loss, {}) if return_outputs else loss


def _tokens(model: Any, pictures: Any) -> Tensor:
    """What the text model gets of the pictures, (tokens of all, width)."""
    found = model.get_image_features(**pictures).pooler_output
    return (torch.cat(list(found)) if isinstance(found, tuple | list) else found.flatten(0, 1)).float()
