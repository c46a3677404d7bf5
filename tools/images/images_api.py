"""Images from a server that speaks the OpenAI images API: vLLM-Omni, SGLang, and hosted services like them.

Steps, guidance, size and seed are always sent, so that the record holds everything the picture was made with
and nothing is left to a server's own defaults.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
from PIL import Image
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from ...domain import UserError
from ...settings import GeneratorSettings
from ..fingerprint import versions
from ..urls import is_local, redact
from .base import GeneratedImage, ImageRequest, UnknownWord, gather_images

#: What is sent where neither the settings nor a preset say otherwise.
_STEPS, _GUIDANCE, _SIZE = 28, 4.0, 1024

#: Requests in flight at once; the server queues and batches by itself.
_CONCURRENCY = 16

#: Seconds for one image, and seconds to go on trying while the server is away or overloaded.
_TIMEOUT, _PATIENCE = 600.0, 300.0

#: Answers worth another try.
_RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class ImagesUnavailable(Exception):
    """The server made no image, after all tries; the message says why in one line."""


class ImagesApiGenerator:
    """A generator behind `POST {base_url}/images/generations`, one request per image."""

    def __init__(
        self,
        settings: GeneratorSettings,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            settings: `base_url` ends before `/images/generations`; `model` is the served model's name.
            transport: Replaces the network, for tests.

        Raises:
            UserError: No usable `base_url`, or an adapter, which a server has to be started with.
        """
        url = (settings.base_url or "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"generator.base_url {settings.base_url!r}: give a URL such as http://host:8000/v1"
            )
        if settings.adapter is not None:
            raise UserError(
                "generator.adapter works in this process only: start the image server with the LoRA instead"
            )
        self._base_url, self._url = settings.base_url, f"{url}/images/generations"
        self._negative_prompt = settings.negative_prompt
        self._making: dict[str, Any] = {
            "model": settings.model,
            "steps": settings.steps or _STEPS,
            "guidance": _GUIDANCE if settings.guidance is None else settings.guidance,
            "height": settings.height or _SIZE,
            "width": settings.width or _SIZE,
            "versions": versions("emoloop"),
        }
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {settings.api_key.strip()}"},
            timeout=_TIMEOUT,
            transport=transport,
            # No proxy leads to this machine.
            trust_env=not is_local(url),
        )

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """Make the images, in the order of the requests; targets are ignored.

        Raises:
            GenerationError: Some failed; its `results` hold those that did not.
        """
        return await gather_images([self._made(request) for request in requests])

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """Nothing: a server does not show its tokenizer."""
        return []

    def describe(self) -> dict[str, Any]:
        """Model and settings in force, as plain JSON."""
        shown = redact(self._base_url or "")
        return {**self._making, "base_url": shown, "negative_prompt": self._negative_prompt}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _made(self, request: ImageRequest) -> GeneratedImage:
        try:
            return await self._one(request)
        except httpx.HTTPError as error:
            # Whoever retries what may pass would begin this patience anew, so the cause is told, not chained.
            said = str(error) if self._url in str(error) else f"{self._url}: {type(error).__name__}: {error}"
            raise ImagesUnavailable(redact(said)) from None

    async def _one(self, request: ImageRequest) -> GeneratedImage:
        negative = self._negative_prompt if request.negative_prompt is None else request.negative_prompt
        making = self._making
        body: dict[str, Any] = {
            "model": making["model"],
            "prompt": request.prompt,
            "n": 1,
            "size": f"{making['width']}x{making['height']}",
            "response_format": "b64_json",
            "seed": request.seed,
            "num_inference_steps": making["steps"],
            "guidance_scale": making["guidance"],
        }
        if negative is not None:
            body["negative_prompt"] = negative
        async with self._slots:
            start = time.perf_counter()
            answer = await self._post(body)
            image = await asyncio.to_thread(_decode, answer, 4 * making["width"] * making["height"])
        made = {"negative_prompt": negative, "height": image.height, "width": image.width}
        seconds = round(time.perf_counter() - start, 4)
        return GeneratedImage(image, request, {**making, **made, "seconds": seconds})

    async def _post(self, body: dict[str, Any]) -> Any:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_transient),
            wait=wait_exponential_jitter(initial=0.5, max=15),
            stop=stop_after_delay(_PATIENCE),
            reraise=True,
        )
        return await retrying(self._receive, body)

    async def _receive(self, body: dict[str, Any]) -> Any:
        """The answer's JSON; an answer that no picture of this size needs is not read to its end."""
        most, content = 2**24 + 8 * self._making["width"] * self._making["height"], bytearray()
        async with self._client.stream("POST", self._url, json=body) as response:
            async for part in response.aiter_bytes(65_536):
                content += part
                if len(content) > most:
                    raise RuntimeError(f"the image server's answer is longer than {most} bytes")
        if response.is_error:
            reason = " ".join(content.decode(errors="replace").split())[:200]
            told = f"{self._url} answered {response.status_code}: {reason}"
            raise httpx.HTTPStatusError(told, request=response.request, response=response)
        return json.loads(content)


def _transient(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _RETRY_STATUS
    return isinstance(error, httpx.TransportError)


def _decode(answer: Any, pixels: int) -> Image.Image:
    try:
        data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > pixels:  # known before anything is unpacked
                raise OSError(f"it is {image.width}x{image.height}, far larger than was asked for")
            return image.convert("RGB")
    except (KeyError, IndexError, TypeError, binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise RuntimeError(
            f"the image server's answer holds no image ({type(error).__name__}: {error})"
        ) from error
