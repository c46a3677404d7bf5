"""A diffusers pipeline in this process behind an asynchronous, batching, deterministic interface.

Why not call the pipeline directly: concurrent runs must share one model, a seed must give the same picture in any
batch, and nothing may block the event loop. So the requests of all callers meet in one worker thread, which fills
batches of a fixed size (a short one is padded), draws each candidate's noise from its own CPU generator, and encodes
each prompt by itself.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ...domain import EmotionTarget, UserError
from ...settings import GeneratorSettings
from .. import presets
from ..diffusion.adapter import Adapter, adapters_on, fuse, load_artifact, unload
from ..diffusion.families import TOKENIZERS, Conditioning, Family, family_of
from ..diffusion.visual import VisualControl
from ..fingerprint import versions
from . import backends
from .base import GeneratedImage, ImageRequest, UnknownWord, gather_images
from .batching import BatchWorker

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

#: Encoded prompts kept; a run has one prompt a round, and an SD3.5 embedding takes 3 MB.
_CACHED_PROMPTS = 32

#: Libraries whose versions decide about the bits of a picture.
_LIBRARIES = ("emoloop", "torch", "diffusers", "transformers", "peft")

#: Attributes of the generator that an event names.
_SAMPLING = ("steps", "guidance", "height", "width")


@dataclass(frozen=True)
class _Row:
    positive: Conditioning
    negative: Conditioning | None
    seed: int


class DiffusersGenerator:
    """A diffusers pipeline that serves many concurrent callers.

    The same request gives the same bits alone or in company: every forward pass has the same shape, and the
    first one of each shape checks that a row's place in the batch does not matter (`micro_batch` shrinks
    where it does). With another `micro_batch` a picture stays within 2/255.

    Attributes:
        pipe: The pipeline.
        family: What its class needs.
        adapter: The adapter that is bound, if any.
        negative: The one that is bound for the negative branch, if any.
        steps: Denoising steps.
        guidance: Guidance scale, in the pipeline's own meaning.
        height: Pixels.
        width: Pixels.
    """

    _way = backends.Way()

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: GeneratorSettings | None = None,
        *,
        model: str | None = None,
        revision: str | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Wrap a pipeline; it is put into eval mode.

        Args:
            pipe: A pipeline of a supported class, on its device.
            settings: What to override; its `model`, `device` and `dtype` are not looked at.
            model: Name for the record; by default the pipeline's own.
            revision: Commit or content hash for the record.
            defaults: The model's `emoloop.json`.

        Raises:
            UserError: Unsupported class, a size or default that it cannot take, an adapter that does not fit.
        """
        self.pipe: Any = pipe
        settings = settings or GeneratorSettings()
        if settings.negative_adapter and (settings.backend != "eager" or settings.fuse_lora):
            raise UserError(
                "generator.negative_adapter speaks in some rows of a batch alone: generator.backend eager and no "
                "generator.fuse_lora are wanted"
            )
        defaults = dict(defaults or {})
        self.family = family_of(pipe, defaults.get("call"))
        self._model = model or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self._revision = revision
        self._negative_prompt = settings.negative_prompt or defaults.get("negative_prompt")
        self._call = self.family.call
        signature = inspect.signature(type(pipe).__call__).parameters
        for name in self._call:
            if name not in signature:
                raise UserError(
                    f"{presets.DEFAULTS_FILE} of {self._model}: {type(pipe).__name__} takes no {name!r}"
                )

        def pick(name: str, fallback: Any) -> Any:
            chosen = getattr(settings, name)
            return chosen if chosen is not None else defaults.get(name, fallback)

        size = self.family.default_size
        self.steps: int = pick("steps", signature["num_inference_steps"].default)
        self.guidance: float = float(pick("guidance", signature["guidance_scale"].default))
        self.height: int = pick("height", size)
        self.width: int = pick("width", size)
        self._check_size()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                # Pipelines built from configs are in train mode, and dropout would break determinism.
                component.eval()
        self._bar = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        # Under CPU offload the pipeline's own `device` says where weights wait, not where they compute.
        self._device, self._dtype = pipe._execution_device, self.family.module.dtype
        self.adapter: Adapter | None = None
        if settings.adapter is not None:
            base, against = {"model": self._model, "revision": revision}, settings.visual_negative
            self.adapter = load_artifact(
                pipe, settings.adapter, scale=settings.adapter_scale, part=settings.adapter_part,
                call=self._call, base=base,
                visual=VisualControl(
                    settings.visual_scale, settings.visual_guidance,
                    None if against is None else EmotionTarget(category=against),
                ),
            )  # fmt: skip
            if settings.guidance is None and self.adapter.guidance is not None:
                self.guidance = self.adapter.guidance
        self.negative: Adapter | None = None
        if settings.negative_adapter is not None:
            self.negative = load_artifact(
                pipe, settings.negative_adapter, scale=settings.negative_scale, call=self._call,
                base={"model": self._model, "revision": revision}, negative=True,
            )  # fmt: skip
        self._closed = False
        self._encode = lru_cache(_CACHED_PROMPTS)(lambda text: self.family.encode(text))
        self._fair_shapes: set[tuple[int, ...]] = set()
        self._worker: BatchWorker[ImageRequest, GeneratedImage] = BatchWorker(
            self._run,
            size=pick("micro_batch", 1 if self._device.type == "cpu" else 4),
            window=settings.batch_window_ms / 1000,
            key=self._emotional,  # extra tokens and visual prompts make other shapes
            name="emoloop-generator",
        )
        self._way = backends.way_of(self, settings)
        if self.adapter is not None and self._way.fuse_lora:
            fuse(self.pipe, self.adapter)
        self._undo = backends.use(self, self._way)

    @property
    def micro_batch(self) -> int:
        """Images in one forward pass; halved where memory or equal treatment of rows asks for it."""
        return self._worker.size

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """Make the images, in the order of the requests.

        Cancelling the call takes its waiting requests out of the queue.

        Raises:
            GenerationError: Some failed; its `results` hold those that did not.
            RuntimeError: The generator is closed.
        """
        return await gather_images([asyncio.wrap_future(f) for f in self._worker.submit(requests)])

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """The words of a prompt that every tokenizer of the model maps to its unknown token."""
        tokenizers = self._tokenizing.tokenizers
        if any(tokenizer.unk_token_id is None for tokenizer in tokenizers):
            return []
        return [
            UnknownWord(word, get_close_matches(word.lower(), self._known_words, 3, 0.0))
            for word in dict.fromkeys(re.findall(r"\w+", prompt))
            if all(it.unk_token_id in it(word, add_special_tokens=False).input_ids for it in tokenizers)
        ]

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is too long for every text encoder of the model; "" for most."""
        return self._tokenizing.unread(prompt)

    @cached_property
    def _tokenizing(self) -> Family:
        # Copies: encoding sets padding inside the fast tokenizers, which must not meet another thread's call.
        pipe = copy.copy(self.pipe)
        for name in TOKENIZERS:
            if getattr(pipe, name, None) is not None:
                setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
        return family_of(pipe, self._call)

    @cached_property
    def _known_words(self) -> list[str]:
        tokenizer = self._tokenizing.tokenizers[0]
        pieces = (piece.removesuffix("</w>").lstrip("▁Ġ") for piece in tokenizer.get_vocab())
        return sorted({p for p in pieces if p.isalpha() and len(p) > 1} - set(tokenizer.all_special_tokens))

    def describe(self) -> dict[str, Any]:
        """Model, adapters (all that are active on the pipeline), settings in force and versions, as plain JSON."""
        return {
            "model": self._model,
            "revision": self._revision,
            "adapter": adapters_on(self.pipe),
            **{name: getattr(self, name) for name in _SAMPLING},
            "pipeline": type(self.pipe).__name__,
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "micro_batch": self.micro_batch,
            "negative_prompt": self._negative_prompt,
            "call": self._call,
            "versions": versions(*_LIBRARIES) | self._run_by,
        }

    @property
    def _run_by(self) -> dict[str, str]:
        """What runs the network, for the record where it is not the default."""
        return {} if self._way == backends.Way() else {"backend": self._way.name}

    async def aclose(self) -> None:
        """Stop the worker and leave the pipeline as it was; a running batch is cut short, a queued one cancelled."""
        if self._closed:
            return
        self._closed = True
        self.pipe._interrupt = True
        await asyncio.to_thread(self._worker.close)
        self._undo()
        for adapter in self._adapters:
            unload(self.pipe, adapter)
        self.pipe.set_progress_bar_config(**self._bar)

    def _emotional(self, request: ImageRequest) -> bool:
        return any(adapter.takes(request.target) for adapter in self._adapters)

    @property
    def _adapters(self) -> list[Adapter]:
        return [adapter for adapter in (self.adapter, self.negative) if adapter is not None]

    def _check_size(self) -> None:
        multiple, largest = self.family.multiple, self.family.largest_size
        for name, value in (("height", self.height), ("width", self.width)):
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(
                    f"{name} {value}: {self._model} needs a multiple of {multiple}, such as {near}"
                )
            if largest is not None and value > largest:
                raise UserError(f"{name} {value}: {self._model} goes up to {largest}")

    # Everything below runs on the worker thread.

    def _run(self, requests: list[ImageRequest]) -> list[GeneratedImage | Exception]:
        start = time.perf_counter()
        rows = [self._row(request) for request in requests]
        images = iter(self._sample([row for row in rows if isinstance(row, _Row)]))
        results = [next(images) if isinstance(row, _Row) else row for row in rows]
        seconds = (time.perf_counter() - start) / max(1, sum(isinstance(row, _Row) for row in rows))
        return [
            result
            if isinstance(result, Exception)
            else GeneratedImage(result, request, self._provenance(request, seconds))
            for request, result in zip(requests, results, strict=True)
        ]

    def _provenance(self, request: ImageRequest, seconds: float) -> dict[str, Any]:
        about = self.describe()
        ran_on = {"device": self._device.type, "dtype": about["dtype"], "micro_batch": str(self.micro_batch)}
        return {
            **{name: about[name] for name in ("model", "revision", "adapter", *_SAMPLING)},
            "negative_prompt": self._negative(request),
            "versions": about["versions"] | ran_on,
            "seconds": round(seconds, 4),
        }

    def _negative(self, request: ImageRequest) -> str | None:
        return request.negative_prompt if request.negative_prompt is not None else self._negative_prompt

    def _row(self, request: ImageRequest) -> _Row | Exception:
        try:
            positive = self._encode(request.prompt)
            guided = self.family.guided(self.guidance)
            negative = self._encode(self._negative(request)) if guided else None
            for adapter in self._adapters:
                positive = adapter.condition(positive, request.target)
                if negative is not None:
                    negative = adapter.condition(negative, request.target, negative=True)
            return _Row(positive, negative, request.seed)
        except Exception as error:
            return error

    def _sample(self, rows: list[_Row]) -> list[Image.Image | Exception]:
        images: list[Image.Image | Exception] = []
        while len(images) < len(rows):
            size = self._worker.size
            chunk = rows[len(images) : len(images) + size]
            try:
                if self._fair(chunk[0], size):
                    images += self._forward(chunk, size)
                else:
                    self._shrink("this device's kernels treat rows of a batch differently")
            except Exception as error:
                if _out_of_memory(error) and size > 1:
                    self._shrink("out of memory")
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                else:
                    images += [error] * len(chunk)
        return images

    def _shrink(self, why: str) -> None:
        before = self._worker.size
        self._worker.size = (before + 1) // 2
        logger.warning("%s: micro_batch goes from %d to %d", why, before, self._worker.size)

    def _fair(self, row: _Row, size: int) -> bool:
        """Whether equal rows of a batch get equal bits, as the same picture in any company needs.

        Not a matter of course: where threads or tiles split a tensor in the middle of a row, its last bits
        depend on its place. That hangs on shapes and cores alone, so one step tells, once for each shape.
        """
        shape = size, *row.positive.carrier.shape[1:]
        if size > 1 and shape not in self._fair_shapes:
            pixels = self._draw([row] * size, [0] * size, 1).images
            if not all(np.array_equal(pixels[0], other, equal_nan=True) for other in pixels[1:]):
                return False
            self._fair_shapes.add(shape)
        return True

    def _forward(self, rows: list[_Row], size: int) -> list[Image.Image | Exception]:
        padded = rows + [rows[-1]] * (size - len(rows))
        output = self._draw(padded, [row.seed for row in padded], self.steps)
        if self.pipe.interrupt:
            raise RuntimeError("the generator was closed")
        refused = getattr(output, "nsfw_content_detected", None) or [False] * size
        return [_picture(*pair) for pair in zip(output.images, refused, strict=True)][: len(rows)]

    def _draw(self, rows: list[_Row], seeds: list[int], steps: int) -> Any:
        negatives = [row.negative for row in rows if row.negative is not None]
        return self.pipe(
            **self.family.arguments(
                Conditioning.cat([row.positive for row in rows]),
                Conditioning.cat(negatives) if negatives else None,
            ),
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **self._call,
        )


def _picture(pixels: np.ndarray, refused: bool) -> Image.Image | Exception:
    if refused:
        return RuntimeError("the pipeline's safety checker refused the image")
    if not np.isfinite(pixels).all():
        return RuntimeError("the model gave pixels that are not numbers (try dtype float32)")
    return Image.fromarray((pixels * 255).round().astype(np.uint8), "RGB")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
