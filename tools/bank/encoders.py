"""What turns texts and pictures into the features of a bank, by name.

    generator=MODEL   a diffusers pipeline's own text encoder: the pooled embeddings (CLIP's text features in SD3, SDXL
                      and FLUX), else the last row. What a visual prompt is found by when sampling, so what a bank for
                      `policy.visual_bank` needs.
    clip=MODEL        `CLIPTextModelWithProjection`
    dinov2=MODEL      the pooled output of DINOv2, or of any vision model that has one
    lvlm=MODEL        what the vision tower of an image-text-to-text model hands its language model, mean over patches

MODEL is a preset, a folder or a hub id. A judge's features have no business here: pictures made from them would please
it. Your own encoder: a dotted path to a callable that takes MODEL and gives a `bank.TextEncoder` or `VisualEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ...domain import UserError, first_line
from ...settings import GeneratorSettings
from .. import presets
from ..diffusion.visual import spoken
from ..images.pipelines import device_of, open_model
from ..quiet import quiet
from ..registry import resolve
from .bank import Floats, TextEncoder, VisualEncoder

#: Name → dotted path.
TEXT: dict[str, str] = {
    "generator": ".tools.bank.encoders:GeneratorText",
    "clip": ".tools.bank.encoders:ClipText",
}
VISUAL: dict[str, str] = {
    "dinov2": ".tools.bank.encoders:Dino",
    "lvlm": ".tools.bank.encoders:LvlmVision",
}

#: Models for names that come without one.
_USUAL = {
    "generator": "miniature",
    "lvlm": "miniature",
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-base",
}


def text_encoder(spec: str) -> TextEncoder:
    """A text encoder by "NAME" or "NAME=MODEL".

    Raises:
        UserError: Unknown name, or a model that does not load.
    """
    return _made(spec, TEXT, "text encoder")


def visual_encoder(spec: str) -> VisualEncoder:
    """A visual encoder, as `text_encoder`."""
    return _made(spec, VISUAL, "visual encoder")


def _made(spec: str, registry: dict[str, str], kind: str) -> Any:
    name, _, model = spec.partition("=")
    make = resolve(name, registry, kind)
    try:
        with quiet():
            return make(model or _USUAL.get(name, ""))
    except (OSError, ValueError) as error:
        raise UserError(f"{kind} {spec!r} does not load: {first_line(error)}") from error


class GeneratorText:
    """The text encoder of a generator."""

    def __init__(self, model: str) -> None:
        generator = open_model(GeneratorSettings(model=model, dtype="float32"))
        self._family = generator.family
        self.name = f"generator={model}"

    def texts(self, texts: Sequence[str]) -> Floats:
        """As `bank.TextEncoder.texts`."""
        return spoken(self._family.encode(list(texts))).cpu().numpy()


class _Loaded:
    """A transformers model and its preprocessor, on the best device there is."""

    def __init__(self, model: Any, prepare: Any, name: str) -> None:
        self.device, self.prepare, self.name = device_of("auto"), prepare, name
        self.model = model.eval().to(self.device)


class ClipText(_Loaded):
    """CLIP's projected text features."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        super().__init__(
            CLIPTextModelWithProjection.from_pretrained(model),
            AutoTokenizer.from_pretrained(model),
            f"clip={model}",
        )

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Floats:
        """As `bank.TextEncoder.texts`."""
        tokens = self.prepare(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        out = self.model(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return out.text_embeds.float().cpu().numpy()


class Dino(_Loaded):
    """The normed class token of a vision transformer."""

    def __init__(self, model: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__(
            AutoModel.from_pretrained(model), AutoImageProcessor.from_pretrained(model), f"dinov2={model}"
        )

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image]) -> Floats:
        """As `bank.VisualEncoder.pictures`."""
        pixels = self.prepare(list(pictures), return_tensors="pt").pixel_values
        return self.model(pixels.to(self.device)).pooler_output.float().cpu().numpy()


class LvlmVision(_Loaded):
    """The vision tower of an LVLM."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = presets.resolve(model, "lvlm")
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        super().__init__(whole, AutoProcessor.from_pretrained(folder).image_processor, f"lvlm={model}")

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image]) -> Floats:
        """As `bank.VisualEncoder.pictures`."""
        inputs = self.prepare([[picture] for picture in pictures], return_tensors="pt").to(self.device)
        # A tensor (patches, D) for each picture.
        patches = self.model.model.get_image_features(**inputs).pooler_output
        return np.stack([it.float().mean(0).cpu().numpy() for it in patches])
