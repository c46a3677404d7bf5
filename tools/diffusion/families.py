"""What differs between the pipeline classes: how text becomes embeddings and how they enter the call.

Text is always encoded one prompt at a time and by us, never inside the pipeline call: so an embedding has the
same bits in any batch, it can be cached, and emotion can be added to it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ...domain import UserError


@dataclass(frozen=True)
class Embeds:
    """Encoded text.

    Attributes:
        prompt: Token embeddings, shape (B, L, D).
        pooled: Pooled embeddings, shape (B, P); None for models that have none.
    """

    prompt: Tensor
    pooled: Tensor | None = None

    @staticmethod
    def stack(rows: Sequence[Embeds]) -> Embeds:
        """Concatenate along the batch; all rows have the same length."""
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Embeds(torch.cat([row.prompt for row in rows]), torch.cat(pooled) if pooled else None)


class Family(ABC):
    """One class of diffusers pipelines.

    Attributes:
        pipeline: Name of the diffusers class.
        denoiser: The component that LoRA adapts, "transformer" or "unet".
    """

    pipeline: ClassVar[str]
    denoiser: ClassVar[str] = "transformer"

    def network(self, pipe: Any) -> Any:
        """The denoiser itself."""
        return getattr(pipe, self.denoiser)

    @torch.no_grad()
    def encode(self, pipe: Any, text: str | None, call: Mapping[str, Any] | None = None) -> Embeds:
        """Encode one prompt.

        Args:
            pipe: The pipeline.
            text: The prompt; None is "no negative prompt", what guidance steers away from by default.
            call: Extra arguments of the pipeline's call; those that encoding knows are used.

        Returns:
            Embeddings of batch 1, on the pipeline's device and in its dtype.
        """
        known = inspect.signature(pipe.encode_prompt).parameters
        extra = {key: value for key, value in (call or {}).items() if key in known}
        return self._encode(pipe, text or "", extra)

    @abstractmethod
    def _encode(self, pipe: Any, text: str, extra: dict[str, Any]) -> Embeds: ...

    def guided(self, pipe: Any, guidance: float, call: Mapping[str, Any]) -> bool:
        """Whether the pipeline will run a second, negative branch."""
        return guidance > 1

    def arguments(self, positive: Embeds, negative: Embeds | None) -> dict[str, Any]:
        """The embeddings as arguments of the pipeline's call."""
        named = {"prompt_embeds": positive.prompt, "pooled_prompt_embeds": positive.pooled}
        if negative is not None:
            named["negative_prompt_embeds"] = negative.prompt
            named["negative_pooled_prompt_embeds"] = negative.pooled
        return {name: value for name, value in named.items() if value is not None}

    @abstractmethod
    def multiple(self, pipe: Any) -> int:
        """Height and width must be multiples of this many pixels."""

    def default_size(self, pipe: Any) -> int:
        """Height and width that the pipeline takes when none are given."""
        return pipe.default_sample_size * pipe.vae_scale_factor

    def largest_size(self, pipe: Any) -> int | None:
        """The largest height and width that the model has positions for; None where there is no limit."""
        return None


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, with or without the T5 encoder."""

    pipeline = "StableDiffusion3Pipeline"

    @override
    def _encode(self, pipe: Any, text: str, extra: dict[str, Any]) -> Embeds:
        prompt, _, pooled, _ = pipe.encode_prompt(
            text, None, None, do_classifier_free_guidance=False, **extra
        )
        return Embeds(prompt, pooled)

    @override
    def multiple(self, pipe: Any) -> int:
        return pipe.vae_scale_factor * pipe.patch_size

    @override
    def largest_size(self, pipe: Any) -> int | None:
        positions = pipe.transformer.config.pos_embed_max_size
        return positions * self.multiple(pipe) if positions else None


class Flux(Family):
    """FLUX.1: guidance is an input of the network; a negative branch runs only with `true_cfg_scale` > 1."""

    pipeline = "FluxPipeline"

    @override
    def _encode(self, pipe: Any, text: str, extra: dict[str, Any]) -> Embeds:
        prompt, pooled, _ = pipe.encode_prompt(text, None, **extra)
        return Embeds(prompt, pooled)

    @override
    def guided(self, pipe: Any, guidance: float, call: Mapping[str, Any]) -> bool:
        return call.get("true_cfg_scale", 1.0) > 1

    @override
    def multiple(self, pipe: Any) -> int:
        return pipe.vae_scale_factor * 2


class StableDiffusionXL(Family):
    """Stable Diffusion XL."""

    pipeline = "StableDiffusionXLPipeline"
    denoiser = "unet"

    @override
    @torch.no_grad()
    def encode(self, pipe: Any, text: str | None, call: Mapping[str, Any] | None = None) -> Embeds:
        """As `Family.encode`; the published weights were trained with zeros in place of an empty prompt."""
        embeds = super().encode(pipe, text, call)
        if text is None and pipe.config.force_zeros_for_empty_prompt and embeds.pooled is not None:
            return Embeds(torch.zeros_like(embeds.prompt), torch.zeros_like(embeds.pooled))
        return embeds

    @override
    def _encode(self, pipe: Any, text: str, extra: dict[str, Any]) -> Embeds:
        prompt, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, **extra)
        return Embeds(prompt, pooled)

    @override
    def guided(self, pipe: Any, guidance: float, call: Mapping[str, Any]) -> bool:
        return guidance > 1 and pipe.unet.config.time_cond_proj_dim is None

    @override
    def multiple(self, pipe: Any) -> int:
        return math.lcm(8, pipe.vae_scale_factor)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"

    @override
    def _encode(self, pipe: Any, text: str, extra: dict[str, Any]) -> Embeds:
        prompt, _ = pipe.encode_prompt(
            text, pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False, **extra
        )
        return Embeds(prompt)

    @override
    def guided(self, pipe: Any, guidance: float, call: Mapping[str, Any]) -> bool:
        return guidance > 1 and pipe.unet.config.time_cond_proj_dim is None

    @override
    def multiple(self, pipe: Any) -> int:
        return math.lcm(8, pipe.vae_scale_factor)

    @override
    def default_size(self, pipe: Any) -> int:
        return pipe.unet.config.sample_size * pipe.vae_scale_factor


FAMILIES: dict[str, Family] = {
    family.pipeline: family for family in (StableDiffusion3(), Flux(), StableDiffusionXL(), StableDiffusion())
}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline object, or of a class name as `model_index.json` has it.

    Raises:
        UserError: The class is not supported.
    """
    names = [pipe] if isinstance(pipe, str) else [cls.__name__ for cls in type(pipe).__mro__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(f"{names[0]} is not supported; these are: {', '.join(FAMILIES)}")
