"""A generator and a chat model that take no time, or a fixed one: what is left is the cost of the loop itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image

from ...tools.images.base import GeneratedImage, ImageRequest, UnknownWord, gather_images
from ...tools.images.batching import BatchWorker

#: Pixels on a side.
SIZE = 96


def picture(seed: int) -> Image.Image:
    """A picture of soft spots, another one for each seed."""
    spots = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


class FakeGenerator:
    """Makes pictures of soft spots.

    Args:
        seconds: What a batch takes on the one device; 0 makes each picture at once.
        batch: Pictures in a batch.
        notes: A file that gets the seed of each picture in a batch that is made, a line each.
    """

    def __init__(self, seconds: float = 0.0, batch: int = 8, notes: str | None = None) -> None:
        def run(seeds: list[int]) -> list[Image.Image | Exception]:
            time.sleep(seconds)
            if notes:
                with open(notes, "a") as file:
                    file.writelines(f"{seed}\n" for seed in seeds)
            return [picture(seed) for seed in seeds]

        self._worker = BatchWorker[int, Image.Image](run, size=batch, window=0.002) if seconds else None

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """See `Generator`."""

        async def one(request: ImageRequest) -> GeneratedImage:
            if self._worker is None:
                return GeneratedImage(picture(request.seed), request, self.describe())
            [image] = self._worker.submit([request.seed])
            return GeneratedImage(await asyncio.wrap_future(image), request, self.describe())

        return await gather_images(map(one, requests))

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """None."""
        return []

    def describe(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"model": "fake", "height": SIZE, "width": SIZE}

    async def aclose(self) -> None:
        """See `Generator`."""
        if self._worker is not None:
            self._worker.close()


class FakeLVLM(BaseChatModel):
    """Answers critics and rewriters after `seconds`, always alike and never with what reaches a target."""

    seconds: float = 0.0

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        critic = isinstance(messages[0], SystemMessage) and len(messages[-1].content) == 3
        text = json.dumps(_CRITIQUE if critic else _REWRITE)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return self._generate(messages)


_CRITIQUE = {
    "analysis": "Soft spots of many colours, some of them bright.",
    "valence": "+0.5",
    "arousal": "+0.5",
    "category": "awe",
    "alignment": "0.8",
    "suggestion": "Use warmer light and a calmer sea.",
}
_REWRITE = {"why": "Warm light is pleasant.", "changes": "light", "prompt": "a dog by the sea in warm light"}
