"""Score mode with a gradient: an LVLM's valence and arousal as a function of the picture's pixels.

The reading is that of `scores.py`, the expectation over signs and digits, and any image-text-to-text model that
transformers loads will do. A processor takes PIL images and gives a gradient to nobody; but what it does to a picture
of a size that it need not change is to move numbers about, to scale and to shift them. So it is asked once for each
size, by a few pictures whose pixels say where they stand, and then followed by indexing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from langchain_core.messages import AIMessage, BaseMessage
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from ...domain import UserError
from .chat import to_openai
from .embedded import EmbeddedLVLM
from .scores import BEGINNING, KEYS, PLACES, expectation


class GradientReader:
    """Reads pictures with a model in this process.

    Args:
        chat: The model; its weights are shared.
    """

    def __init__(self, chat: EmbeddedLVLM) -> None:
        self._decoder = chat.decoder
        self._moves = lru_cache(4)(self._find_moves)

    def __call__(self, pictures: Tensor, messages: Sequence[Sequence[BaseMessage]]) -> Tensor:
        """What the model believes.

        Args:
            pictures: (B, 3, H, W) in [0, 1].
            messages: The chat about each, with one picture in it (any address).

        Returns:
            (B, 2) valence and arousal, float32 at least, with gradient to the pictures.

        Raises:
            UserError: The processor resamples pictures of this size.
        """
        model, answer = self._decoder.model, self._answer
        inputs = self._inputs(pictures, messages)
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            written: Tensor = model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=len(answer), eos_token_id=None,
                    pad_token_id=min(self._decoder.stops),
                ),
                prefix_allowed_tokens_fn=lambda _, said: answer[min(len(said) - start, len(answer) - 1)],
            )  # fmt: skip
        padding = (inputs["attention_mask"] == 0).sum(1)
        logits = model(**self._on_the_right(inputs, written, padding)).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = torch.arange(len(pictures), device=logits.device)
        # What stands before a token says how likely it is.
        before = [logits[rows, start + place - 1 - padding] for place in range(len(answer))]
        said = written[:, start:].tolist()
        found = [self._read(ids, [it[row] for it in before]) for row, ids in enumerate(said)]
        return torch.stack(found)

    def _inputs(self, pictures: Tensor, messages: Sequence[Sequence[BaseMessage]]) -> dict[str, Tensor]:
        processor = self._decoder.processor
        texts = []
        for chat in messages:
            turns = to_openai([*chat, AIMessage(BEGINNING)])
            for part in (part for turn in turns for part in turn["content"] if part["type"] != "text"):
                part.pop("image_url")
                part["type"] = "image"
            texts.append(processor.apply_chat_template(turns, tokenize=False, continue_final_message=True))
        height, width = pictures.shape[2:]
        blank = [[Image.new("RGB", (width, height))] for _ in texts]
        inputs = processor(text=texts, images=blank, padding=True, return_tensors="pt")
        source, scale, shift, shape = self._moves(height, width)
        flat = pictures.permute(0, 2, 3, 1).flatten(1)[:, source.to(pictures.device)]
        moved = (flat * scale.to(flat) + shift.to(flat)).reshape(-1, *shape[1:])
        device, dtype = self._decoder.model.device, self._decoder.model.dtype
        return {**inputs.to(device), "pixel_values": moved.to(device, dtype)}

    def _find_moves(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """(source, scale, shift, shape): number i of the processor's is number source[i] of the picture (H, W, 3),
        in [0, 1], times scale[i] plus shift[i]."""

        def shown(picture: np.ndarray) -> Tensor:
            image = Image.fromarray(picture.astype(np.uint8))
            return self._decoder.processor.image_processor(images=[image], return_tensors="pt")[
                "pixel_values"
            ]

        numbers = np.arange(height * width * 3).reshape(height, width, 3)
        black, white = (shown(np.full_like(numbers, value)) for value in (0, 255))
        scale = white - black
        parts = [shown(numbers >> bits & 255) for bits in (0, 8, 16)]
        bytes_ = [torch.where(scale == 0, 0, (part - black) / scale * 255).round().long() for part in parts]
        source = sum(part << bits for part, bits in zip(bytes_, (0, 8, 16), strict=True))
        assert isinstance(source, Tensor)
        test = np.random.default_rng(0).integers(0, 256, numbers.shape)
        there = source.clamp(0, numbers.size - 1)
        ours = torch.from_numpy(test.ravel())[there] / 255 * scale + black
        if not torch.allclose(ours, shown(test), atol=1e-3):
            raise UserError(
                f"{self._decoder.name} resamples pictures of {width} × {height}: give the critic a size that its "
                "processor takes as it is (objective.size; multiples of 28 for Qwen2.5-VL)"
            )
        return there.flatten(), scale.flatten(), black.flatten(), tuple(black.shape)

    @cached_property
    def _answer(self) -> list[list[int]]:
        """The tokens that may stand at each place of the answer."""
        found: list[list[int]] = []
        for key in KEYS:
            if found:
                found += [[token] for token in self._tokens(f'", "{key}": "')]
            found += [[self._tokens(it)[0] for it in place or "."] for place in PLACES]
        return found

    def _tokens(self, text: str) -> list[int]:
        return self._decoder.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def _begins(self) -> dict[str, Tensor]:
        """The tokens that begin with each character of a number."""
        return {
            character: torch.tensor(
                [number for number, it in enumerate(self._decoder.bytes) if it.startswith(character.encode())]
            )
            for character in "".join(PLACES)
        }

    def _read(self, said: list[int], logits: list[Tensor]) -> Tensor:
        """(2,) of one answer: its tokens, and the logits of each."""
        axes = []
        # The numbers stand at both ends.
        for start in (0, len(said) - len(PLACES)):
            places = range(start, start + len(PLACES))
            written = "".join(self._decoder.bytes[said[place]].decode() for place in places)
            chances = [self._chances(logits[place], PLACES[place - start]) for place in places]
            axes.append(expectation(written, *chances))
        return torch.stack(axes)

    def _chances(self, logits: Tensor, allowed: str) -> dict[str, Tensor]:
        if not allowed:
            return {}
        sums = torch.stack([logits[self._begins[it].to(logits.device)].logsumexp(0) for it in allowed])
        return dict(zip(allowed, sums.softmax(0), strict=True))

    @staticmethod
    def _on_the_right(inputs: dict[str, Tensor], written: Tensor, padding: Tensor) -> dict[str, Any]:
        """The inputs with the answer, padded behind it: a row's positions then count from its own beginning."""
        length, more = inputs["input_ids"].shape[1], written.shape[1] - inputs["input_ids"].shape[1]
        whole = {"input_ids": written}
        for name, rows in inputs.items():
            if rows.shape == (len(written), length) and name != "input_ids":
                fill = rows.new_full((len(rows), more), int(name == "attention_mask"))
                whole[name] = torch.cat([rows, fill], 1)
        rolled = {
            name: torch.stack([row.roll(-int(by)) for row, by in zip(rows, padding, strict=True)])
            for name, rows in whole.items()
        }
        return {**inputs, **rolled}
