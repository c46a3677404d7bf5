"""What training needs to know of each pipeline class: how its network is called and its latents are coded.

Text is encoded by `tools.families`, as sampling does it. Everything above this file sees plain latents
(B, C, H, W), a time per row and a `Conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...domain import UserError
from .families import Embeds, family_of
from .process import Diffusion, Flow, Process

if TYPE_CHECKING:
    from PIL.Image import Image


class Conditioning(Embeds):
    """What the network is told, a row for each image: encoded text with the operations of a batch."""

    def __len__(self) -> int:
        return len(self.prompt)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a function to both tensors."""
        return Conditioning(function(self.prompt), None if self.pooled is None else function(self.pooled))

    def __getitem__(self, rows: Any) -> Conditioning:
        return self.map(lambda x: x[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As `Tensor.to`."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def expand(self, n: int) -> Conditioning:
        """A single row n times."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))

    def repeat(self, k: int) -> Conditioning:
        """The whole batch k times over."""
        return self.map(lambda x: x.repeat(k, *(1,) * (x.ndim - 1)))

    @staticmethod
    def cat(parts: Sequence[Embeds]) -> Conditioning:
        """The rows of several, all of one length."""
        joined = Embeds.stack(parts)
        return Conditioning(joined.prompt, joined.pooled)


class Network:
    """The denoiser of a pipeline. This base serves SD1.5; the others override what differs.

    Args:
        pipe: The pipeline.
        call: Extra keywords of its call that the model's `emoloop.json` names (max_sequence_length …).
    """

    lora_targets: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.call = dict(call or {})
        self.family = family_of(pipe)

    @property
    def module(self) -> Any:
        """The network itself."""
        return self.family.network(self.pipe)

    @property
    def lora_excluded(self) -> list[str]:
        """Layers that bear a targeted name but have no say in the output."""
        return []

    def encode(self, prompt: str | None) -> Conditioning:
        """Embeddings of one prompt, batch 1; None is "no negative prompt"."""
        return Conditioning.cat([self.family.encode(self.pipe, prompt, self.call)])

    @property
    def texts(self) -> list[tuple[int | None, Any]]:
        """What the rows of the embeddings come from, in order: how many (None: the rest) and by which tokenizer."""
        return [(self.pipe.tokenizer.model_max_length, self.pipe.tokenizer)]

    def added_last(self, prompt: str, refined: str, rows: int) -> list[int]:
        """An order of a refined prompt's rows in which what it adds to another stands at the end of the padding.

        None of these networks knows the order of its text: attention hears the rows as a set. So the rows may lie
        as suits whoever learns to make them, and words that stand in the same rows behind every prompt are easier
        to learn than words that begin where each prompt happens to end.

        Args:
            prompt: The shorter prompt.
            refined: The longer; one that is no longer stays as it is.
            rows: L of the embeddings (B, L, D).

        Returns:
            L places: the row that comes first, second and so on.
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

    def denoise(self, module: nn.Module, x: Tensor, t: Tensor, told: Conditioning, guidance: float) -> Tensor:
        """The network's prediction, (B, C, H, W); `guidance` matters only where it is an input."""
        return module(x, t, encoder_hidden_states=told.prompt, return_dict=False)[0]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of one image."""
        scale = self.pipe.vae_scale_factor
        return self.module.config.in_channels, height // scale, width // scale

    def image_tokens(self, shape: tuple[int, int, int]) -> int:
        """Tokens of one latent, for schedules that depend on it."""
        patch = getattr(self.module.config, "patch_size", None) or 1
        return (shape[1] // patch) * (shape[2] // patch)

    def process(self) -> Process:
        """The noise process that the pipeline's scheduler belongs to."""
        scheduler = self.pipe.scheduler
        return Diffusion(scheduler) if hasattr(scheduler, "alphas_cumprod") else Flow(scheduler)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Latents of images, scaled as the network wants them; the mode, no sample, so they can be cached."""
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(list(images)).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents - _shift(vae)) * vae.config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        """What latents look like: (B, 3, H, W), about [-1, 1], float32; carries gradient."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + _shift(vae)
        return vae.decode(latents, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Images of latents."""
        return self.pipe.image_processor.postprocess(self.pixels(latents), output_type="pil")


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


class SDXL(Network):
    """SDXL: a UNet that also hears pooled embeddings and the image's size."""

    def denoise(self, module: nn.Module, x: Tensor, t: Tensor, told: Conditioning, guidance: float) -> Tensor:
        """As the base; the sizes say: made at this size, not cropped."""
        size = [n * self.pipe.vae_scale_factor for n in x.shape[2:]]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=told.prompt.dtype, device=x.device)
        added = {"text_embeds": told.pooled, "time_ids": ids.expand(len(x), -1)}
        return module(x, t, encoder_hidden_states=told.prompt, added_cond_kwargs=added, return_dict=False)[0]


_JOINT_ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip


class SD3(Network):
    """SD3 and SD3.5: a transformer over text and image tokens, flow matching."""

    lora_targets = _JOINT_ATTENTION

    @property
    def lora_excluded(self) -> list[str]:
        """The last block answers for the image alone: what its text tokens ask is never used."""
        return [f"transformer_blocks.{len(self.module.transformer_blocks) - 1}.attn.add_q_proj"]

    @property
    def texts(self) -> list[tuple[int | None, Any]]:
        """The CLIP encoders' rows, which have one vocabulary, then T5's."""
        rows: list[tuple[int | None, Any]] = [(self.pipe.tokenizer_max_length, self.pipe.tokenizer)]
        return rows if self.pipe.text_encoder_3 is None else [*rows, (None, self.pipe.tokenizer_3)]

    def denoise(self, module: nn.Module, x: Tensor, t: Tensor, told: Conditioning, guidance: float) -> Tensor:
        """As the base; the network counts time in thousandths."""
        return module(
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=told.prompt,
            pooled_projections=told.pooled,
            return_dict=False,
        )[0]


class Flux(Network):
    """FLUX: packed latents, rotary positions, guidance as an input of the network."""

    lora_targets = _JOINT_ATTENTION

    @property
    def texts(self) -> list[tuple[int | None, Any]]:
        """T5 alone: CLIP gives the pooled embeddings."""
        return [(None, self.pipe.tokenizer_2)]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """As the base, before packing 2 × 2."""
        scale = self.pipe.vae_scale_factor * 2
        return self.module.config.in_channels // 4, 2 * (height // scale), 2 * (width // scale)

    def image_tokens(self, shape: tuple[int, int, int]) -> int:
        """A token is 2 × 2 latent pixels."""
        return (shape[1] // 2) * (shape[2] // 2)

    def process(self) -> Process:
        """As the base."""
        return Flow(self.pipe.scheduler, even_sigmas=True)

    def denoise(self, module: nn.Module, x: Tensor, t: Tensor, told: Conditioning, guidance: float) -> Tensor:
        """As the base, between packing and unpacking."""
        b, c, h, w = x.shape
        rows = torch.arange(h // 2, device=x.device).repeat_interleave(w // 2)
        columns = torch.arange(w // 2, device=x.device).repeat(h // 2)
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(x.dtype)
        packed = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)
        guided = self.module.config.guidance_embeds
        out = module(
            hidden_states=packed,
            timestep=t,
            guidance=torch.full((b,), guidance, device=x.device) if guided else None,
            encoder_hidden_states=told.prompt,
            pooled_projections=told.pooled,
            txt_ids=torch.zeros(told.prompt.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


NETWORKS: dict[str, type[Network]] = {
    "StableDiffusionPipeline": Network,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
}


def network_of(pipe: Any, call: Mapping[str, Any] | None = None) -> Network:
    """The network of a pipeline.

    Raises:
        UserError: A pipeline class that we cannot train.
    """
    for cls in type(pipe).__mro__:
        if cls.__name__ in NETWORKS:
            return NETWORKS[cls.__name__](pipe, call)
    raise UserError(f"{type(pipe).__name__} cannot be trained; these can: {', '.join(NETWORKS)}")
