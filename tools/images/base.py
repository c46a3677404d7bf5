"""What is asked of a generator and what it gives; light types, so that naming them loads no model library."""

from __future__ import annotations

import asyncio
import inspect
import io
from collections.abc import Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...domain import EmotionTarget, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


def encoded(image: Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file's bytes: its kind and options as Pillow's `save` takes them."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
        super().__init__(f"{len(errors)} of {len(self.results)} images failed: {first_line(errors[0])}")
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


class Wrapped:
    """A whole `Generator` from an object that has `generate(requests)` and perhaps others of its methods.

    `generate` may be async or not (then one call runs at a time, in a thread), and may give `GeneratedImage`s or plain
    PIL images, one per request. What is not said of a picture stays unknown in the log; the model's name is the
    class's, unless `describe()` says one.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emoloop-generator")

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """As `Generator.generate`."""
        loop, call = asyncio.get_running_loop(), self._source.generate
        made = await loop.run_in_executor(self._thread, call, requests)
        made = await made if inspect.isawaitable(made) else made
        images = [
            it if isinstance(it, GeneratedImage) else GeneratedImage(it, request)
            for it, request in zip(made, requests, strict=True)
        ]
        for it in images:
            it.provenance = {"model": self.describe()["model"], **it.provenance}
        return images

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """None, where the object does not say."""
        return self._ask("unknown_words", prompt) or []

    def describe(self) -> dict[str, Any]:
        """What the object says, and at least a name for the model."""
        return {"model": type(self._source).__name__, **(self._ask("describe") or {})}

    async def aclose(self) -> None:
        """Close the object where it can be closed."""
        closed = self._ask("aclose")
        if inspect.isawaitable(closed):
            await closed
        self._thread.shutdown(wait=False)

    def _ask(self, name: str, *args: Any) -> Any:
        return getattr(self._source, name)(*args) if hasattr(self._source, name) else None
