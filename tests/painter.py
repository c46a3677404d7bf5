"""A generator that paints plain colours: what a picture makes one feel follows from prompt and seed by rule.

`bright` raises the light and `red` the warmth, so that a rewriter can get somewhere. What goes wrong is
scripted: `fail` maps a call's number to an exception.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from emoloop.tools.images.base import GeneratedImage, GenerationError, ImageRequest, UnknownWord
from PIL import Image

WORDS = {
    "a",
    "dog",
    "cat",
    "by",
    "on",
    "the",
    "sea",
    "hill",
    "bright",
    "dark",
    "red",
    "calm",
    "house",
    "boat",
}


class Painter:
    def __init__(
        self, fail: Callable[[int], Exception | None] = lambda number: None, delay: float = 0.0
    ) -> None:
        self.fail = fail
        self.delay = delay
        self.requests: list[ImageRequest] = []
        self.closed = False

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        results: list[GeneratedImage | BaseException] = []
        for request in requests:
            number = len(self.requests)
            self.requests.append(request)
            await asyncio.sleep(self.delay)
            error = self.fail(number)
            results.append(error if error else GeneratedImage(_paint(request), request, self._making()))
        if any(isinstance(result, BaseException) for result in results):
            raise GenerationError(results)
        return results  # pyright: ignore[reportReturnType]

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        unknown = [word for word in prompt.split() if word not in WORDS]
        return [UnknownWord(word, ["dog", "cat"]) for word in unknown]

    def describe(self) -> dict[str, Any]:
        return {"model": "painter", "revision": None, "adapter": None, "steps": 1}

    async def aclose(self) -> None:
        self.closed = True

    def _making(self) -> dict[str, Any]:
        return {
            "model": "painter",
            "revision": None,
            "adapter": None,
            "negative_prompt": None,
            "steps": 1,
            "guidance": 1.0,
            "height": 16,
            "width": 16,
            "versions": {},
            "seconds": 0.0,
        }


def _paint(request: ImageRequest) -> Image.Image:
    digest = hashlib.sha256(f"{request.prompt}|{request.seed}".encode()).digest()
    noise = np.random.default_rng(list(digest)).normal(0, 12, (16, 16, 3))
    light = 110 + 30 * request.prompt.count("bright") - 30 * request.prompt.count("dark") + digest[0] / 8
    noise[..., 0] += 25 * request.prompt.count("red")
    return Image.fromarray((noise + light).clip(0, 255).astype(np.uint8), "RGB")
