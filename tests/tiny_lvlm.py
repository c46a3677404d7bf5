"""A tiny Idefics3 with random weights that transformers and vLLM both serve, built offline in a second.

folder = build(tmp_path / "lvlm")          # a folder for AutoProcessor, AutoModelForImageTextToText, vLLM
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

IMAGE, PATCH, SCALE = 96, 12, 2
IMAGE_TOKENS = (IMAGE // PATCH // SCALE) ** 2  # 16; the processor puts three more around them

# The order fixes the ids 0…: pad, end of answer, roles, then what Idefics3's processor puts around an image.
SPECIALS = [
    "<|pad|>",
    "<end_of_utterance>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
]

# Digits and signs stand alone, so that a number is read and scored one character at a time; a letter run
# takes the space (or one mark such as a quote) before it; other marks run together with a leading space.
SPLIT = r"\p{N}|[+\-]|[^\r\n\p{L}\p{N}+\-]?\p{L}+| ?[^\s\p{L}\p{N}+\-]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# One token per role, nothing else between the parts: <|system|>critic<|user|>prompt:
# …\n<image>critique:<|assistant|>
CHAT_TEMPLATE = (
    "{%- for m in messages -%}<|{{ m.role }}|>"
    "{%- if m.content is string -%}{{ m.content }}"
    "{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type == 'text' -%}{{ p.text }}{%- elif p.type in ('image', 'image_url') -%}<image>{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if m.role == 'assistant' -%}<end_of_utterance>{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def build_tokenizer(
    corpus: Iterable[str], vocab: int = 1024, max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `corpus`; specials have the ids 0 to 7, every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<end_of_utterance>",
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 256,
    layers: int = 5,
    intermediate: int = 512,
    vision_hidden: int = 160,
    vision_layers: int = 4,
    vision_intermediate: int = 320,
    context: int = 2048,
) -> Idefics3Config:
    """The architecture. Head size is 32 on both sides, the smallest that vLLM's CPU attention takes."""
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        scale_factor=SCALE,
        pad_token_id=tokenizer.pad_token_id,
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 64) * 64,  # vLLM pads to 64 anyway
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 64,
            "head_dim": 32,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            **ids,
        },
        vision_config={
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_hidden // 32,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
    )


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> Idefics3ForConditionalGeneration:
    """Random weights, float32, eval mode. `sizes` as in `build_config`."""
    model = Idefics3ForConditionalGeneration(build_config(tokenizer, **sizes)).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def save(
    folder: str | Path, model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Write a folder for `AutoProcessor` / `AutoModelForImageTextToText` / `vllm serve`.

    The processor files are written by hand in the hub's layout: the class name without "Pil" lets
    transformers pick PIL or torchvision by what is installed. A 96 x 96 image passes every resize
    untouched, hence equal pixels in both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    image = {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": IMAGE},
        "max_image_size": {"longest_edge": IMAGE},
        "resample": 1,
        "do_image_splitting": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


CORPUS = [
    "critic prompt: a dog by the sea\ntarget: valence +2.0 arousal -1.0 category awe\n",
    "critique: rewrite: score:",
    '{"analysis": "a dog, a sun; bright warm beach", "valence": "+1.2", "arousal": "-0.3", '
    '"category": "awe", "alignment": "1.0", "suggestion": "add balloons"}',
    '{"why": "too calm", "changes": "added a storm", "prompt": "a dog by the sea, storm, dark"}',
]


def build(folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Write a random model; small sizes unless told otherwise."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(CORPUS * 20)
    small = {"hidden": 64, "layers": 2, "intermediate": 64, "vision_hidden": 32, "vision_layers": 1}
    model = build_model(tokenizer, **{**small, "vision_intermediate": 32, **sizes})
    with torch.no_grad():  # wider than the usual init, so that greedy answers vary with the picture
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return save(folder, model, tokenizer)
