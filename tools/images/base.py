"""What is asked of a generator and what it gives; light types, so that naming them loads no model library."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...domain import EmotionTarget

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageRequest:
    """One image to make.

    Attributes:
        prompt: The text.
        seed: Seed of the candidate's own noise.
        target: The wanted emotion, for a generator that has emotion tokens; others ignore it.
        negative_prompt: What to steer away from; None takes the generator's setting.
    """

    prompt: str
    seed: int
    target: EmotionTarget | None = None
    negative_prompt: str | None = None


@dataclass
class GeneratedImage:
    """An image and how it was made.

    Attributes:
        image: The picture, RGB.
        request: What was asked for.
        provenance: The fields of `events.ImageGenerated` that describe the making: model, revision,
            adapter, negative_prompt, steps, guidance, height, width, versions, seconds; all may be left out.
    """

    image: Image
    request: ImageRequest
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnknownWord:
    """A word of a prompt that the model's tokenizer does not know.

    Attributes:
        word: The word as written.
        nearest: Up to three known words, the most similar spelling first.
    """

    word: str
    nearest: list[str]


class GenerationError(Exception):
    """At least one image of a call could not be made.

    Attributes:
        results: One entry per request, in order: the image, or the exception that concerns this request.
    """

    def __init__(self, results: Sequence[GeneratedImage | BaseException]) -> None:
        self.results = list(results)
        errors = [result for result in self.results if isinstance(result, BaseException)]
        reason = str(errors[0]).strip() or type(errors[0]).__name__
        super().__init__(f"{len(errors)} of {len(self.results)} images failed: {reason.splitlines()[0]}")
        self.__cause__ = errors[0]


@runtime_checkable
class Generator(Protocol):
    """What makes images from requests."""

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """Make the images, in the order of the requests.

        Raises:
            GenerationError: Some failed; its `results` hold those that did not.
        """
        ...

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """The words of a prompt that the model does not know."""
        ...

    def describe(self) -> dict[str, Any]:
        """Model, settings in force and versions, as plain JSON."""
        ...

    async def aclose(self) -> None:
        """Release the model; what is queued is cancelled."""
        ...


async def gather_images(pending: Iterable[Awaitable[GeneratedImage]]) -> list[GeneratedImage]:
    """Await all of them; raise `GenerationError` with everything there is when some failed."""
    done = await asyncio.gather(*pending, return_exceptions=True)
    images = [result for result in done if isinstance(result, GeneratedImage)]
    if len(images) < len(done):
        raise GenerationError(done)
    return images


def unread_text(generator: Generator, prompt: str) -> str:
    """The end of a prompt that the generator's text encoders do not read; "" where it does not say.

    A generator says so by a method `unread(prompt)`, which is no part of the protocol.
    """
    unread: Any = getattr(generator, "unread", None)
    return "" if unread is None else unread(prompt)
