"""The picture maker: a diffusers pipeline behind an asynchronous, batching, deterministic door.

Why not call the pipeline directly: concurrent runs must share one model, a seed must give the same picture
whoever else asks at the same moment, and nothing may block the event loop. So the requests of all callers
meet in one worker thread, which fills fixed-size batches (a short one is padded), draws each candidate's
noise from its own CPU generator, and encodes each prompt by itself.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from ...domain import EmotionTarget, UserError
from ...settings import GeneratorSettings
from .. import presets
from ..diffusion.adapter import Adapter, load_artifact
from ..diffusion.conditioners import points
from ..diffusion.families import Embeds, family_of
from ..fingerprint import revision, versions
from ..quiet import quiet
from ..registry import resolve
from ..threads import apart
from .batching import BatchWorker

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

#: Encoded prompts kept; a run has one prompt a round, and an SD3.5 embedding takes 3 MB.
_CACHED_PROMPTS = 32

#: Libraries whose versions decide about the bits of a picture.
_LIBRARIES = ("emoloop", "torch", "diffusers", "transformers", "peft")


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
        provenance: The fields of `recording.ImageGenerated` that describe the making: model, revision,
            adapter, negative_prompt, steps, guidance, height, width, versions, seconds.
    """

    image: Image.Image
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


@dataclass(frozen=True)
class _Row:
    positive: Embeds
    negative: Embeds | None
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
        steps: Denoising steps.
        guidance: Guidance scale, in the pipeline's own meaning.
        height: Pixels.
        width: Pixels.
    """

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
        self.family = family_of(pipe)
        settings = settings or GeneratorSettings()
        defaults = dict(defaults or {})
        self._model = model or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        self._revision = revision
        self._negative_prompt = settings.negative_prompt or defaults.get("negative_prompt")
        self._call: dict[str, Any] = dict(defaults.get("call") or {})
        signature = inspect.signature(type(pipe).__call__).parameters
        for name in self._call:
            if name not in signature:
                raise UserError(
                    f"{presets.DEFAULTS_FILE} of {self._model}: {type(pipe).__name__} takes no {name!r}"
                )

        def pick(name: str, fallback: Any) -> Any:
            chosen = getattr(settings, name)
            return chosen if chosen is not None else defaults.get(name, fallback)

        size = self.family.default_size(pipe)
        self.steps: int = pick("steps", signature["num_inference_steps"].default)
        self.guidance: float = float(pick("guidance", signature["guidance_scale"].default))
        self.height: int = pick("height", size)
        self.width: int = pick("width", size)
        self._check_size()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                # Pipelines built from configs are in train mode, and dropout would break determinism.
                component.eval()
        pipe.set_progress_bar_config(disable=True)
        self._device, self._dtype = pipe.device, self.family.network(pipe).dtype
        self.adapter: Adapter | None = None
        if settings.adapter is not None:
            self.adapter = load_artifact(
                pipe, settings.adapter, scale=settings.adapter_scale, call=self._call
            )
            if settings.guidance is None and self.adapter.guidance is not None:
                self.guidance = self.adapter.guidance
        self._embeds: OrderedDict[str | None, Embeds] = OrderedDict()
        self._fair_shapes: set[tuple[int, int]] = set()
        self._worker: BatchWorker[ImageRequest, GeneratedImage] = BatchWorker(
            self._run,
            size=pick("micro_batch", 1 if self._device.type == "cpu" else 4),
            window=settings.batch_window_ms / 1000,
            key=self._emotional,  # extra tokens make other shapes
            name="emoloop-generator",
        )

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
        unknown = []
        for word in dict.fromkeys(re.findall(r"\w+", prompt)):
            if self._word_tokenizers and all(
                tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
                for tokenizer in self._word_tokenizers
            ):
                unknown.append(UnknownWord(word, get_close_matches(word.lower(), self._known_words, 3, 0.0)))
        return unknown

    @cached_property
    def _word_tokenizers(self) -> list[Any]:
        # Copies: encoding sets padding inside the fast tokenizers, which must not meet another thread's call.
        found = [getattr(self.pipe, f"tokenizer{suffix}", None) for suffix in ("", "_2", "_3")]
        present = [tokenizer for tokenizer in found if tokenizer is not None]
        return [] if any(t.unk_token_id is None for t in present) else [copy.deepcopy(t) for t in present]

    @cached_property
    def _known_words(self) -> list[str]:
        tokenizer = self._word_tokenizers[0]
        pieces = (piece.removesuffix("</w>").lstrip("▁Ġ") for piece in tokenizer.get_vocab())
        return sorted({p for p in pieces if p.isalpha() and len(p) > 1} - set(tokenizer.all_special_tokens))

    def describe(self) -> dict[str, Any]:
        """Model, settings in force and versions, as plain JSON."""
        return {
            "model": self._model,
            "revision": self._revision,
            "adapter": self._adapter_id,
            "pipeline": type(self.pipe).__name__,
            "device": str(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "steps": self.steps,
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "micro_batch": self.micro_batch,
            "negative_prompt": self._negative_prompt,
            "call": self._call,
            "versions": versions(*_LIBRARIES),
        }

    async def aclose(self) -> None:
        """Stop the worker; a batch that is running is cut short, what is queued is cancelled."""
        self.pipe._interrupt = True
        await asyncio.to_thread(self._worker.close)

    @property
    def _adapter_id(self) -> str | None:
        return self.adapter.id if self.adapter else None

    def _emotional(self, request: ImageRequest) -> bool:
        adapter = self.adapter
        return (
            adapter is not None
            and adapter.emotion_tokens is not None
            and adapter.scale != 0
            and request.target is not None
        )

    def _check_size(self) -> None:
        multiple, largest = self.family.multiple(self.pipe), self.family.largest_size(self.pipe)
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
        rows: dict[int, _Row] = {}
        results: dict[int, GeneratedImage | Exception] = {}
        start = time.perf_counter()
        for index, request in enumerate(requests):
            try:
                rows[index] = self._row(request)
            except Exception as error:
                results[index] = error
        images = dict(zip(rows, self._sample(list(rows.values())), strict=True))
        seconds = (time.perf_counter() - start) / max(1, len(rows))
        for index, image in images.items():
            if isinstance(image, Exception):
                results[index] = image
            else:
                provenance = self._provenance(requests[index], seconds)
                results[index] = GeneratedImage(image, requests[index], provenance)
        return [results[index] for index in range(len(requests))]

    def _provenance(self, request: ImageRequest, seconds: float) -> dict[str, Any]:
        return {
            "model": self._model,
            "revision": self._revision,
            "adapter": self._adapter_id,
            "negative_prompt": self._negative(request),
            "steps": self.steps,
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "versions": {
                **versions(*_LIBRARIES),
                "device": self._device.type,
                "dtype": str(self._dtype).removeprefix("torch."),
                "micro_batch": str(self.micro_batch),
            },
            "seconds": round(seconds, 4),
        }

    def _negative(self, request: ImageRequest) -> str | None:
        return request.negative_prompt if request.negative_prompt is not None else self._negative_prompt

    def _encode(self, text: str | None) -> Embeds:
        if text in self._embeds:
            self._embeds.move_to_end(text)
        else:
            self._embeds[text] = self.family.encode(self.pipe, text, self._call)
            if len(self._embeds) > _CACHED_PROMPTS:
                self._embeds.popitem(last=False)
        return self._embeds[text]

    def _row(self, request: ImageRequest) -> _Row:
        positive = self._encode(request.prompt)
        guided = self.family.guided(self.pipe, self.guidance, self._call)
        negative = self._encode(self._negative(request)) if guided else None
        if self._emotional(request):
            assert self.adapter is not None and self.adapter.emotion_tokens is not None
            tokens = self.adapter.emotion_tokens
            with torch.no_grad():
                wanted = points([request.target], self._device)
                positive = tokens(positive, wanted, self.adapter.scale)
                negative = tokens.null(negative) if negative is not None else None
        return _Row(positive, negative, request.seed)

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
        shape = size, row.positive.prompt.shape[1]
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
                Embeds.stack([row.positive for row in rows]), Embeds.stack(negatives) if negatives else None
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


def load_generator(
    spec: GeneratorSettings | str | Path | DiffusionPipeline | Generator,
    settings: GeneratorSettings | None = None,
) -> Generator:
    """A generator from whatever names one.

    Args:
        spec: Settings; or what replaces their `model`: a preset, folder or hub id, a dotted path to a
            callable that takes the settings and returns a `Generator` (`"my_pkg.my_mod:MyGenerator"`), a
            pipeline object, or a generator, which is returned as it is. A pipeline object that was loaded from
            a folder with an `emoloop.json` keeps to it.
        settings: Everything else; defaults where None.

    Raises:
        UserError: What is named is not there, is no pipeline, is not supported, or does not fit.
    """
    if isinstance(spec, GeneratorSettings):
        spec, settings = spec.model, spec
    settings = settings or GeneratorSettings()
    if isinstance(spec, str | Path):
        settings = settings.model_copy(update={"model": str(spec)})
        if settings.base_url is not None:
            from .images_api import ImagesApiGenerator

            return ImagesApiGenerator(settings)
        if ":" in str(spec) and not Path(spec).exists():
            return resolve(str(spec), {}, "generator")(settings)
        return apart(_open, settings)
    if isinstance(spec, Generator):
        return spec
    if settings.device != "auto":
        spec.to(_device(settings.device))
    source = spec.config.get("_name_or_path")
    if source and (Path(source) / presets.DEFAULTS_FILE).is_file():
        defaults = presets.read_defaults(Path(source) / presets.DEFAULTS_FILE)
        return DiffusersGenerator(spec, settings, revision=revision(Path(source)), defaults=defaults)
    return DiffusersGenerator(spec, settings)


def _open(settings: GeneratorSettings) -> DiffusersGenerator:
    found = presets.resolve(settings.model)
    folder = found if isinstance(found, Path) else _download(found)
    defaults = {**presets.defaults(settings.model), **presets.read_defaults(folder / presets.DEFAULTS_FILE)}
    device = _device(settings.device)
    pipe = load_pipeline(folder, _dtype(settings.dtype, device), defaults.get("load") or {}).to(device)
    return DiffusersGenerator(
        pipe, settings, model=settings.model, revision=revision(folder), defaults=defaults
    )


def load_pipeline(folder: Path, dtype: torch.dtype, load: dict[str, Any] | None = None) -> Any:
    """Load a diffusers folder, on the CPU and in eval mode.

    Components that `model_index.json` leaves out or sets to null are passed as None, which is what diffusers
    wants for an SD3 without T5. Components whose class is this package's own are imported first, since
    diffusers imports no module that it doesn't know.

    Args:
        folder: The model folder.
        dtype: Dtype of the weights.
        load: Extra arguments for `from_pretrained`.

    Raises:
        UserError: No folder, not a diffusers pipeline, an unsupported class, or files that do not load.
    """
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    components = presets.read_defaults(index)
    name = str(components.pop("_class_name", ""))
    with quiet():
        pipeline_class = getattr(import_module("diffusers"), family_of(name).pipeline)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    # What has another default (flags such as requires_safety_checker) is no component.
    absent = {
        key: None
        for key, parameter in parameters.items()
        if key != "self"
        and parameter.default in (None, inspect.Parameter.empty)
        and (components.get(key) or [None])[0] is None
    }
    own = __name__.partition(".")[0]
    for value in components.values():
        if isinstance(value, list) and value and str(value[0]).partition(".")[0] == own:
            _import_component(folder, str(value[0]))
    try:
        with quiet():
            pipe = pipeline_class.from_pretrained(folder, dtype=dtype, **{**absent, **(load or {})})
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} does not load as a {name}: {reason}") from error
    return pipe


def _import_component(folder: Path, module: str) -> None:
    if module not in sys.modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{folder} names a component in {module!r}, which cannot be imported") from error


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no folder {hub_id!r} here, and the model hub did not give it: {reason}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


__all__ = [
    "DiffusersGenerator",
    "GeneratedImage",
    "GenerationError",
    "Generator",
    "ImageRequest",
    "UnknownWord",
    "load_generator",
    "load_pipeline",
]
