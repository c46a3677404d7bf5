"""A tiny CLIP model with random weights, as transformers and OpenCLIP have it: real classes, no real sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from emoloop.tools.scorers import _IN_BLOCKS, _NAMES, _TURNED
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 3, "a": 2, "dog": 4, "cat": 5, "<unk>": 6}


def save(folder: Path, seed: int = 0, **more: Any) -> Path:
    """Write model and processor."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **more,
    }
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=8, max_position_embeddings=8, eos_token_id=3, bos_token_id=1, pad_token_id=0, **small
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), fast).save_pretrained(folder)
    return folder


def as_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights by OpenCLIP's names."""
    out: dict[str, torch.Tensor] = {}
    for tower, root in (("text", ""), ("vision", "visual.")):
        layer, block = f"{tower}_model.encoder.layers.0", f"{root}transformer.resblocks.0"
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in _IN_BLOCKS.items():
                out[f"{block}.{theirs}.{kind}"] = state[f"{layer}.{ours}.{kind}"]
    for theirs, ours in _NAMES.items():
        for kind in ("", ".weight", ".bias"):
            if (value := state.get(f"{ours}{kind}")) is not None:
                out[f"{theirs}{kind}"] = value.T.contiguous() if theirs in _TURNED else value
    return out
