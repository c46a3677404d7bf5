"""Pipeline families: everything that differs between the pipeline classes, for sampling and training alike.

Sampling goes through the pipeline's own call, training through `denoise`; both see the same text embeddings.
Text is encoded one prompt at a time, never inside the pipeline call: an embedding then has the same bits in any
batch, can be cached, and a conditioner can change it. Everything above this file sees plain latents (B, C, H, W),
one time per row, and a `Conditioning`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from ...domain import UserError
from .process import Diffusion, Flow, Process

if TYPE_CHECKING:
    from PIL.Image import Image

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on, one row per image.

    Attributes:
        prompt: Token embeddings, shape (B, L, D).
        pooled: Pooled embeddings, shape (B, P); None for models that have none.
        visual: A visual prompt, (B, K, W), for the attention of `visual.py`; None where there is none.
        negative: 1 for a row of the negative branch, else 0, (B, 1), for `negative.py`; None where nobody asks.
    """

    prompt: Tensor
    pooled: Tensor | None = None
    visual: Tensor | None = None
    negative: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to each tensor."""
        parts = (None if x is None else function(x) for x in (self.pooled, self.visual, self.negative))
        return Conditioning(function(self.prompt), *parts)

    def __getitem__(self, rows: Any) -> Conditioning:
        return self.map(lambda x: x[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As `Tensor.to`."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def expand(self, n: int) -> Conditioning:
        """A single row n times."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))

    def repeat(self, k: int) -> Conditioning:
        """The whole batch k times."""
        return self.map(lambda x: x.repeat(k, *(1,) * (x.ndim - 1)))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; all rows have the same length L, and all or none what is not the prompt."""

        def joined(name: str) -> Tensor | None:
            found = [it for part in parts if (it := getattr(part, name)) is not None]
            return torch.cat(found) if found else None

        return Conditioning(
            torch.cat([part.prompt for part in parts]), *map(joined, ("pooled", "visual", "negative"))
        )

    @property
    def carrier(self) -> Tensor:
        """The prompt with the numbers of visual prompt and branch as further columns, (B, L, D + ⌈K W / L⌉ + 1).

        All that pipelines do with embeddings (stacking both branches, a row for each image) they then do with all
        of it, and `negative.NegativeBranch` and `visual.VisualBridge` part them again before the denoiser.
        """
        rows, columns = self.prompt.shape[1], [self.prompt]
        for part in (self.visual, self.negative):
            if part is not None:
                flat = part.flatten(1).to(self.prompt.dtype)
                # A single number stands in each row.
                flat = flat.expand(-1, rows) if flat.shape[1] == 1 else pad(flat, (0, -flat.shape[1] % rows))
                columns.append(flat.unflatten(1, (rows, -1)))
        return torch.cat(columns, -1) if columns[1:] else self.prompt


class Family(ABC):
    """One class of diffusers pipelines, bound to a pipeline.

    Args:
        pipe: The pipeline.
        call: Extra arguments of its call (`call` of `emoloop.json`: max_sequence_length …).

    Attributes:
        pipeline: Name of the diffusers class.
        denoiser: The component that LoRA adapts, "transformer" or "unet".
        lora_targets: Name endings of the layers that a LoRA adapts by default.
        text_attention: Pattern of the names of the attention layers in which the image reads the text.
        attention_kwargs: Name of the argument that the denoiser hands to its attention processors.
        even_sigmas: As for `Flow`.
    """

    pipeline: ClassVar[str]
    denoiser: ClassVar[str]
    lora_targets: ClassVar[list[str]]
    text_attention: ClassVar[str] = r"transformer_blocks\.\d+\.attn"
    attention_kwargs: ClassVar[str] = "joint_attention_kwargs"
    even_sigmas: ClassVar[bool] = False

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.call = dict(call or {})

    @property
    def module(self) -> Any:
        """The denoiser itself."""
        return getattr(self.pipe, self.denoiser)

    # Text.

    @torch.no_grad()
    def encode(self, text: str | list[str] | None) -> Conditioning:
        """Encode one prompt.

        Args:
            text: The prompt; None is "no negative prompt", what guidance steers away from by default. Several at once
                are quicker, and a text's last bits then depend on its company.

        Returns:
            Embeddings of batch 1 (or of the list's length), on the pipeline's device and in its dtype.
        """
        known = inspect.signature(type(self.pipe).encode_prompt).parameters
        how = {"prompt_2": None, "prompt_3": None, "device": self.pipe._execution_device}
        how |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **self.call}
        encoded = self.pipe.encode_prompt(text or "", **{key: how[key] for key in how if key in known})
        return self.conditioning(self.named(encoded))

    def named(self, encoded: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """What the pipeline's `encode_prompt` gives, by the names that its call takes."""
        signs = ("", "negative_")
        names = [f"{sign}{kind}" for kind in ("prompt_embeds", "pooled_prompt_embeds") for sign in signs]
        return dict(zip(names, encoded, strict=False))

    @staticmethod
    def conditioning(named: Mapping[str, Tensor | None], sign: str = "") -> Conditioning:
        """The positive or (`sign` "negative_") the negative branch of `named`."""
        prompt = named[f"{sign}prompt_embeds"]
        assert prompt is not None
        return Conditioning(prompt, named.get(f"{sign}pooled_prompt_embeds"))

    @property
    def tokenizers(self) -> list[Any]:
        """Those that the pipeline has."""
        found = [getattr(self.pipe, name, None) for name in TOKENIZERS]
        return [tokenizer for tokenizer in found if tokenizer is not None]

    @property
    def texts(self) -> list[tuple[int | None, Any]]:
        """Where the rows of the embeddings come from, in order: (rows, tokenizer); None stands for the rest."""
        return [(self.pipe.tokenizer.model_max_length, self.pipe.tokenizer)]

    def unread(self, text: str) -> str:
        """The end of a prompt that no text encoder reads, since it is longer than each of them takes; or ""."""
        left = []
        for rows, tokenizer in self.texts:
            limit = rows or self.call.get("max_sequence_length") or self._sequence_length
            how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
            starts = [start for start, _ in tokenizer(text, **how).offset_mapping]
            kept = limit - tokenizer.num_special_tokens_to_add()
            left.append(text[starts[kept] :].strip() if len(starts) > kept else "")
        return min(left, key=len)

    @property
    def _sequence_length(self) -> int:
        return inspect.signature(type(self.pipe).__call__).parameters["max_sequence_length"].default

    def added_last(self, prompt: str, refined: str, rows: int) -> list[int]:
        """An order of a refined prompt's rows in which what it adds to another prompt stands at the padding's end.

        None of these networks knows the order of its text: attention takes the rows as a set. So the order is free,
        and words at the same rows behind every prompt are easier to learn than words that begin where each prompt
        happens to end.

        Args:
            prompt: The shorter prompt.
            refined: The longer; one that is no longer keeps its order.
            rows: L of the embeddings (B, L, D).

        Returns:
            L row indices: the row that comes first, second and so on.
        """
        order, start = [], 0
        for count, tokenizer in self.texts:
            end = rows if count is None else min(rows, start + count)
            short, long = (
                len(tokenizer(text, truncation=True, max_length=end - start).input_ids)
                for text in (prompt, refined)
            )
            # The last token is the end mark.
            last, added = start + long - 1, max(0, long - short)
            order += [*range(start, last - added), *range(last, end), *range(last - added, last)]
            start = end
        return order + list(range(start, rows))

    # Sampling by the pipeline's call.

    def guided(self, guidance: float) -> bool:
        """Whether the pipeline will run a second, negative branch."""
        return guidance > 1

    def arguments(self, positive: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
        """The embeddings as arguments of the pipeline's call."""
        named = {"prompt_embeds": positive.carrier, "pooled_prompt_embeds": positive.pooled}
        if negative is not None:
            named["negative_prompt_embeds"] = negative.carrier
            named["negative_pooled_prompt_embeds"] = negative.pooled
        return {name: value for name, value in named.items() if value is not None}

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this many pixels: one token's."""
        return self.pipe.vae_scale_factor * getattr(self.pipe, "patch_size", 2)

    @property
    def default_size(self) -> int:
        """Height and width, in pixels, that the pipeline takes when none are given."""
        size = getattr(self.pipe, "default_sample_size", None) or self.module.config.sample_size
        return size * self.pipe.vae_scale_factor

    @property
    def largest_size(self) -> int | None:
        """The largest height and width that the model has positions for; None where there is no limit."""
        return None

    # Training.

    @property
    def lora_excluded(self) -> list[str]:
        """Layers that have a targeted name but no effect on the output."""
        return []

    @abstractmethod
    def denoise(self, module: Any, x: Tensor, t: Tensor, condition: Conditioning, guidance: float) -> Tensor:
        """The network's prediction, (B, C, H, W); `guidance` matters only where it is an input."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of one image."""
        scale = self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, height // scale, width // scale

    def image_tokens(self, shape: tuple[int, int, int]) -> int:
        """Tokens of one latent, for schedules that depend on it."""
        patch = self.multiple // self.pipe.vae_scale_factor
        return (shape[1] // patch) * (shape[2] // patch)

    def process(self) -> Process:
        """The noise process that the pipeline's scheduler belongs to."""
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "alphas_cumprod"):
            return Diffusion(scheduler)
        return Flow(scheduler, self.even_sigmas)

    # Images.

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Latents (B, C, H, W), scaled as the network takes them; the mode and no sample, so they can be cached."""
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(list(images)).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents - self._latent_shift) * vae.config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        """Decoded latents: (B, 3, H, W), about [-1, 1], float32; carries gradient."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + self._latent_shift
        return vae.decode(latents, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Images of latents."""
        return self.pipe.image_processor.postprocess(self.pixels(latents), output_type="pil")

    @property
    def _latent_shift(self) -> float:
        return getattr(self.pipe.vae.config, "shift_factor", None) or 0.0


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"
    lora_targets: ClassVar = ["to_q", "to_k", "to_v", "to_out.0"]
    text_attention = r".+\.attn2"
    attention_kwargs = "cross_attention_kwargs"

    @override
    def guided(self, guidance: float) -> bool:
        return guidance > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    @property
    @override
    def multiple(self) -> int:
        return math.lcm(8, self.pipe.vae_scale_factor)

    @override
    def denoise(self, module: Any, x: Tensor, t: Tensor, condition: Conditioning, guidance: float) -> Tensor:
        return module(x, t, encoder_hidden_states=condition.carrier, return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: a UNet that also takes pooled embeddings and the image's size."""

    pipeline = "StableDiffusionXLPipeline"

    @override
    def encode(self, text: str | list[str] | None) -> Conditioning:
        """As `Family.encode`; the published weights were trained with zeros in place of an empty prompt."""
        condition = super().encode(text)
        zeros = text is None and self.pipe.config.force_zeros_for_empty_prompt
        return condition.map(torch.zeros_like) if zeros else condition

    @override
    def denoise(self, module: Any, x: Tensor, t: Tensor, condition: Conditioning, guidance: float) -> Tensor:
        # The size embedding says: made at this size, not cropped.
        size = [n * self.pipe.vae_scale_factor for n in x.shape[2:]]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=condition.prompt.dtype, device=x.device)
        added = {"text_embeds": condition.pooled, "time_ids": ids.expand(len(x), -1)}
        return module(
            x, t, encoder_hidden_states=condition.carrier, added_cond_kwargs=added, return_dict=False
        )[0]


_JOINT_ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, with or without T5: a transformer over text and image tokens, flow matching."""

    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    lora_targets = _JOINT_ATTENTION

    @property
    @override
    def texts(self) -> list[tuple[int | None, Any]]:
        """The rows of both CLIP encoders, which have one vocabulary, then T5's."""
        rows: list[tuple[int | None, Any]] = [(self.pipe.tokenizer_max_length, self.pipe.tokenizer)]
        return rows if self.pipe.text_encoder_3 is None else [*rows, (None, self.pipe.tokenizer_3)]

    @property
    @override
    def largest_size(self) -> int | None:
        positions = self.pipe.transformer.config.pos_embed_max_size
        return positions * self.multiple if positions else None

    @property
    @override
    def lora_excluded(self) -> list[str]:
        """The text queries of the last block, whose text output is not used."""
        return [f"transformer_blocks.{len(self.module.transformer_blocks) - 1}.attn.add_q_proj"]

    @override
    def denoise(self, module: Any, x: Tensor, t: Tensor, condition: Conditioning, guidance: float) -> Tensor:
        return module(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=condition.carrier,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]


class Flux(Family):
    """FLUX.1: packed latents, rotary positions, guidance as an input of the network.

    A negative branch runs only with `true_cfg_scale` > 1.
    """

    pipeline = "FluxPipeline"
    denoiser = "transformer"
    lora_targets = _JOINT_ATTENTION
    even_sigmas = True

    @override
    def named(self, encoded: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """As the base; the negative branch is a call of its own."""
        return dict(zip(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), encoded, strict=True))

    @property
    @override
    def texts(self) -> list[tuple[int | None, Any]]:
        """T5 alone: CLIP gives the pooled embeddings."""
        return [(None, self.pipe.tokenizer_2)]

    @override
    def guided(self, guidance: float) -> bool:
        return self.call.get("true_cfg_scale", 1.0) > 1

    @override
    def denoise(self, module: Any, x: Tensor, t: Tensor, condition: Conditioning, guidance: float) -> Tensor:
        b, c, h, w = x.shape
        guided = self.module.config.guidance_embeds
        out = module(
            hidden_states=self.pipe._pack_latents(x.contiguous(), b, c, h, w),
            timestep=t,
            guidance=torch.full((b,), guidance, device=x.device) if guided else None,
            encoder_hidden_states=condition.carrier,
            pooled_projections=condition.pooled,
            txt_ids=torch.zeros(condition.prompt.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype),
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(out, h * scale, w * scale, scale)


FAMILIES: dict[str, type[Family]] = {
    family.pipeline: family for family in (StableDiffusion3, Flux, StableDiffusionXL, StableDiffusion)
}


def family_class(names: Sequence[str]) -> type[Family]:
    """The family of the first supported class name.

    Raises:
        UserError: None of them is supported.
    """
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(f"{names[0]} is not supported; these are: {', '.join(FAMILIES)}")


def family_of(pipe: Any, call: Mapping[str, Any] | None = None) -> Family:
    """The family of a pipeline, bound to it; `call` as for `Family`.

    Raises:
        UserError: The class is not supported.
    """
    return family_class([cls.__name__ for cls in type(pipe).__mro__])(pipe, call)
