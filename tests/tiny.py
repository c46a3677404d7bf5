"""Tiny pipelines of every supported class with random weights, built offline: real classes, no real sense.

They draw 32 by 32 pixels in a few milliseconds. `build(name)` gives a pipeline in eval mode, the same
weights for the same seed; `save(name, folder)` writes it as an ordinary model folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

NAMES = ("sd3", "flux", "sdxl", "sd15")
SIZE = 32
WORDS = (
    "a",
    "an",
    "the",
    "dog",
    "cat",
    "house",
    "boat",
    "by",
    "sea",
    "on",
    "hill",
    "bright",
    "dark",
    "red",
    "calm",
)


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    """Byte-pair tokenizer with an alphabet and no merges: like the real one, it knows every word."""
    letters = [
        *ascii_lowercase,
        *(f"{letter}</w>" for letter in ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={letter: index for index, letter in enumerate(letters)}, merges=[], model_max_length=length
    )


def word_tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """Word-level tokenizer that knows `WORDS` and maps everything else to one unknown token."""
    vocab = {token: index for index, token in enumerate(("[PAD]", "[BOS]", "[UNK]", "[EOS]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", vocab["[BOS]"]), ("[EOS]", vocab["[EOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=length,
    )


def _t5_tokenizer(length: int = 32) -> T5Tokenizer:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in ascii_lowercase),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def _clip(kind: Any, tokenizer: Any, **more: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return kind(config)


def _t5(tokenizer: Any) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def _unet(cross: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd3(tokenizer: Any = None, vae: Any = None) -> StableDiffusion3Pipeline:
    """SD3 with one CLIP encoder in both places and no T5."""
    tokenizer = tokenizer or clip_tokenizer()
    encoder = _clip(CLIPTextModelWithProjection, tokenizer)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae or _vae(8),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> FluxPipeline:
    """FLUX with guidance as an input of the network."""
    tokenizer, tokenizer_2 = clip_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL with two CLIP encoders."""
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=_ddim(),
        add_watermarker=False,
    )


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 without a safety checker."""
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=_unet(16),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


_BUILDERS = {"sd3": sd3, "flux": flux, "sdxl": sdxl, "sd15": sd15}

#: `emoloop.json` for each of them.
DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"steps": 2, "guidance": 3.0, "height": SIZE, "width": SIZE, "micro_batch": 4, "call": call}
    for name, call in {
        "sd3": {"max_sequence_length": 0},
        "flux": {"max_sequence_length": 32},
        "sdxl": {},
        "sd15": {},
    }.items()
}


def build(name: str, seed: int = 0, **kwargs: Any) -> Any:
    """A pipeline of the class that `name` stands for, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[name](**kwargs)
        if name == "sd3":
            # As trained ones are, and so that text matters in a net this small.
            for parameter in pipe.transformer.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(name: str, folder: Path, seed: int = 0, **kwargs: Any) -> Path:
    """Write the pipeline with its `emoloop.json` into `folder`."""
    build(name, seed, **kwargs).save_pretrained(folder)
    (folder / "emoloop.json").write_text(json.dumps(DEFAULTS[name]))
    return folder
