"""A picture made again from its recipe, and held against the one that there is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ..domain import Failure, UserError, first_line
from ..settings import GeneratorSettings, explain
from ..tools.images.base import GenerationError, Generator, ImageRequest
from ..tools.images.load import load_generator
from ..traces.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

#: Largest batch that a recipe may ask for; a picture's last bits depend on it.
_LARGEST_BATCH = 256


#: What a generator says of itself beside the versions.
_MADE_BY = ("model", "revision", "adapter", "steps", "guidance")


@dataclass(frozen=True)
class Remade:
    """A picture that was made again.

    Attributes:
        image: The picture, RGB.
        difference: Largest difference of a channel from the first picture, 0 to 255; None where the sizes differ.
        pixels: Share of pixels that differ, 0 to 1.
        changed: What is another now: model, revision, adapter, sampling, versions of libraries.
        seconds: What it took, without loading.
    """

    image: Image
    difference: int | None
    pixels: float
    changed: list[str]
    seconds: float

    @property
    def same(self) -> bool:
        """Whether all pixels agree."""
        return self.difference == 0


def settings_for(
    recipe: Recipe, base: GeneratorSettings, over: Mapping[str, Any] | None = None
) -> GeneratorSettings:
    """Settings under which a generator follows a recipe.

    Args:
        recipe: How the picture was made; what it says of sampling wins.
        base: Model, adapter and device.
        over: More settings, over those of `base`.

    Raises:
        UserError: The recipe asks for what no setting takes.
    """
    how: dict[str, Any] = {
        key: getattr(recipe, key) for key in ("steps", "guidance", "height", "width") if getattr(recipe, key)
    }
    batch, dtype = recipe.versions.get("micro_batch", ""), recipe.versions.get("dtype")
    if batch.isdecimal() and int(batch) <= _LARGEST_BATCH:
        how["micro_batch"] = int(batch)
    if dtype is not None:
        how["dtype"] = dtype
    try:
        return GeneratorSettings.model_validate(
            {**base.model_dump(), "negative_prompt": None, **(over or {}), **how}
        )
    except ValidationError as error:
        raise UserError(f"the recipe cannot be followed: {explain(error)}") from error


async def remake(recipe: Recipe, original: Image, settings: GeneratorSettings) -> Remade:
    """Make a picture again.

    Args:
        recipe: How it was made.
        original: The picture that there is, RGB.
        settings: Of the generator, as `settings_for` gives them; `api_key` and the like are its own.

    Raises:
        UserError: The model or the adapter cannot be used.
        Failure: The generator made no picture.
    """
    generator = load_generator(settings)
    try:
        return await remake_by(generator, recipe, original)
    finally:
        await generator.aclose()


async def remake_by(generator: Generator, recipe: Recipe, original: Image) -> Remade:
    """Make a picture again by a generator that is there.

    Args:
        generator: As it is set: `changed` says where that is not as the recipe has it.
        recipe: How it was made.
        original: The picture that there is, RGB.

    Raises:
        Failure: The generator made no picture.
    """
    request = ImageRequest(recipe.prompt, recipe.seed, recipe.target, recipe.negative_prompt)
    began = time.perf_counter()
    try:
        [made] = await generator.generate([request])
    except GenerationError as error:
        raise Failure(f"no picture could be made: {first_line(error.__cause__ or error)}") from error
    seconds = time.perf_counter() - began
    image, about = made.image.convert("RGB"), made.provenance
    then, now = recipe.versions, about.get("versions", {})
    pairs = {
        **{name: (getattr(recipe, name), about.get(name)) for name in _MADE_BY},
        **{name: (then.get(name), now.get(name)) for name in sorted({*then, *now})},
    }  # fmt: skip
    changed = [f"{name} {was} then, {now_is} now" for name, (was, now_is) in pairs.items() if was != now_is]
    if image.size != original.size:
        return Remade(image, None, 1.0, changed, seconds)
    apart = np.abs(np.asarray(image, np.int16) - np.asarray(original, np.int16)).max(axis=2)
    return Remade(image, int(apart.max()), float((apart > 0).mean()), changed, seconds)
