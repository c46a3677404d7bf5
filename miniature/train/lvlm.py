"""Recipe of the vision-language model: Idefics3 from scratch, critic and rewriter in one.

Every step sees critiques of freshly rendered scenes, spoiled a little as a generator would spoil them, and
simulated rewriting episodes (`emoloop.miniature.episodes`). Head size 32 and the plain chat template are what
vLLM's CPU attention and transformers both take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .. import law, world
from ..codec import PatchAutoencoder
from ..episodes import Example, critic_example, rewriter_example
from .common import Recipe
from .generator import FACTORS, THINGS, layout, whole

IMAGE_TOKENS = 16
# The order fixes the ids: pad, end of answer, roles, then what Idefics3's processor puts around an image.
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
# Digits and signs stand alone, so that a number is read and scored one character at a time.
SPLIT = r"\p{N}|[+\-]|[^\r\n\p{L}\p{N}+\-]?\p{L}+| ?[^\s\p{L}\p{N}+\-]+|\s*[\r\n]+|\s+(?!\S)|\s+"
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
_IMAGE = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"


def prompt_text(example: Example) -> str:
    """The rendered chat with the image already expanded to its tokens, as the processor gives it."""
    image = _IMAGE if example.pixels is not None else ""
    return f"<|system|>{example.system}<|user|>{example.task}{image}{example.question}<|assistant|>"


#: Examples of each kind that the tokenizer learns from.
_CORPUS = 3000


def build_tokenizer(seed: int, vocabulary: int = 1216) -> PreTrainedTokenizerFast:
    """A byte-level BPE on 6,000 examples."""
    rng = np.random.default_rng([seed, 77])
    corpus = []
    for _ in range(_CORPUS):
        for example in (critic_example(rng, world.FOLDS["critic"]), rewriter_example(rng)):
            corpus += [f"{example.system}\n{example.task}{example.question}", example.answer]
    # Rare words must be single tokens too.
    corpus += [f" {word}" for word in world.words()] * 20
    corpus += [f" {word}" for word in (*world.COMPANIONS, *world.SUBJECTS)] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<end_of_utterance>", model_max_length=2048,
        padding_side="left", clean_up_tokenization_spaces=False, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """About 3.5 M parameters; the image is 8 × 8 patches, shuffled to 16 tokens."""
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            **ids,
        },
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "image_size": world.SIZE,
            "patch_size": 12,
        },
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def save(folder: Path, model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a folder that transformers and vLLM load, weights in float16.

    The image processor's name without "Pil" lets transformers pick PIL or torchvision by what is installed; a
    96 × 96 picture passes every resize untouched, hence equal pixels in both.
    """
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    image = {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": world.SIZE},
        "max_image_size": {"longest_edge": world.SIZE},
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
    preset = {
        "critic_prompt": "critic-compact",
        "rewriter_prompt": "rewriter-compact",
        "max_tokens": 224,
        "batch_size": 32,
        "threads": 1,
    }
    (folder / "emoloop.json").write_text(json.dumps(preset, indent=2) + "\n")


def spoil(rng: np.random.Generator, codec: PatchAutoencoder, pixels: np.ndarray) -> Tensor:
    """Pictures as a generator would give them: through the codec, with latent noise, blur and smeared tokens.

    Args:
        rng: NumPy generator.
        codec: The generator's codec.
        pixels: RGB uint8, shape (batch, 96, 96, 3).

    Returns:
        Shape (batch, 3, 96, 96) in [-1, 1].
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = codec.encode(x).latent_dist.mode()
    strength = torch.from_numpy(rng.uniform(0, 0.35, len(x)) * (rng.random(len(x)) < 0.7)).float()[
        :, None, None, None
    ]
    noise = torch.from_numpy(rng.standard_normal(z.shape)).float()
    spoiled = codec.decode(z + strength * noise).sample
    for i in range(len(x)):
        if rng.random() < 0.3:
            kept = int(rng.integers(4, 12))
            masked = z[i : i + 1].clone()
            masked[:, kept:] *= float(rng.uniform(0, 0.6))
            spoiled[i] = codec.decode(masked).sample[0]
    clean = torch.from_numpy(rng.random(len(x)) < 0.15)[:, None, None, None]
    result = torch.where(clean, x, spoiled).clamp(-1, 1)
    return torch.round((result + 1) * 127.5) / 127.5 - 1


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels (-100 outside the answers), padded on the right, each (batch, length)."""
    prompts = tokenizer([prompt_text(e) for e in examples], add_special_tokens=False).input_ids
    answers = tokenizer(
        [e.answer + "<end_of_utterance>" for e in examples], add_special_tokens=False
    ).input_ids
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full((len(examples), length), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels


class _Sight(nn.Module):
    """What the vision tower must show: the icon on each patch, the surroundings, and what colour and whole feel like.

    Lives only in training: words alone teach a vision tower slowly.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.things = nn.Linear(width, THINGS)
        self.whole = nn.ModuleList(nn.Linear(width, len(table)) for table in FACTORS)
        self.affect = nn.Linear(width, 4)

    def loss(self, patches: Tensor, scenes: list[world.Scene], pixels: list[np.ndarray]) -> dict[str, Tensor]:
        """Cross-entropies and squared errors of `patches`, shape (batch, 64, width), float32."""
        device = patches.device
        covers = torch.from_numpy(np.stack([layout(s) for s in scenes])).to(device).flatten()
        weight = torch.where(covers == 0, 0.15, 1.0)
        things = F.cross_entropy(self.things(patches).float().flatten(0, 1), covers, reduction="none")
        mean = patches.mean(1)
        labels = torch.tensor([whole(s) for s in scenes], device=device)
        surroundings = [
            F.cross_entropy(head(mean).float(), labels[:, i]) for i, head in enumerate(self.whole)
        ]
        truth = [(*law.colour_affect(p), *law.affect(s, p)) for s, p in zip(scenes, pixels, strict=True)]
        felt = F.mse_loss(self.affect(mean).float(), torch.tensor(truth, dtype=torch.float32, device=device))
        return {
            "things": (things * weight).sum() / weight.sum(),
            "whole": torch.stack(surroundings).mean(),
            "felt": felt,
        }


def train(recipe: Recipe, part: Literal["all", "vision", "rewriter"] = "all") -> list[float]:
    """Train and write the model to `recipe.out / "model"`.

    Args:
        recipe: The run.
        part: "vision" teaches the vision tower alone: a step then costs a fifth, so that it sees many more
            pictures; a second run takes its checkpoint as `init`. "rewriter" shows three rewrites for each
            critique, "all" the other way round.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(0)
    model = build_model(tokenizer).to(recipe.device)
    model.train()
    # The CPU's fused attention has a backward pass that takes half of the step at these sizes.
    model.set_attn_implementation("eager" if recipe.device == "cpu" else "sdpa")
    codec = PatchAutoencoder()
    rng = np.random.default_rng([recipe.seed, 78])
    codec.fit(np.stack([world.render(world.sample_scene(rng)) for _ in range(1000)]))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}; vocabulary {len(tokenizer)}")
    # Marks of the JSON skeleton are learned at once; numbers are what is hard.
    weight = torch.ones(model.config.text_config.vocab_size, device=recipe.device)
    for token in ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "-"):
        weight[tokenizer.convert_tokens_to_ids(token)] = 1.5

    def answer_loss(ids: Tensor, labels: Tensor, pixels: Tensor | None) -> Tensor:
        inputs = {} if pixels is None else {"pixel_values": pixels[:, None].to(recipe.device)}
        hidden = model.model(
            input_ids=ids.to(recipe.device), attention_mask=(ids != tokenizer.pad_token_id).long().to(recipe.device),
            use_cache=False, **inputs,
        ).last_hidden_state  # fmt: skip
        told = (labels[:, 1:] != -100).to(recipe.device)
        logits = model.lm_head(hidden[:, :-1][told]).float()
        return F.cross_entropy(logits, labels[:, 1:].to(recipe.device)[told], weight=weight)

    sight = _Sight(model.config.vision_config.hidden_size).to(recipe.device)
    trainee = nn.ModuleDict({"model": model, "sight": sight})
    patches: list[Tensor] = []
    model.model.vision_model.register_forward_hook(lambda _m, _i, out: patches.append(out.last_hidden_state))
    if recipe.init is not None and recipe.init.is_dir():
        model.load_state_dict(Idefics3ForConditionalGeneration.from_pretrained(recipe.init).state_dict())
    elif recipe.init is not None:
        state = torch.load(recipe.init, map_location=recipe.device, weights_only=True)["average"]
        trainee.load_state_dict(state, strict=False)
    if part == "vision":
        model.requires_grad_(False)
        model.model.vision_model.requires_grad_(True)

    def sight_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([recipe.seed, step])
        scenes = [world.sample_scene(rng, world.FOLDS["critic"]) for _ in range(2 * recipe.batch)]
        pixels = [world.render(s) for s in scenes]
        patches.clear()
        model.model.vision_model(pixel_values=spoil(rng, codec, np.stack(pixels)).to(recipe.device))
        parts = sight.loss(patches.pop(), scenes, pixels)
        return torch.stack(list(parts.values())).sum(), {k: v.item() for k, v in parts.items()}

    def joint_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([recipe.seed, step])
        looks = recipe.batch // 4 if part == "rewriter" else recipe.batch * 3 // 4
        critiques = [critic_example(rng, world.FOLDS["critic"]) for _ in range(looks)]
        shown = [e.pixels for e in critiques if e.pixels is not None]
        patches.clear()
        seen = answer_loss(*collate(tokenizer, critiques), spoil(rng, codec, np.stack(shown)))
        parts = sight.loss(patches.pop(), [e.scene for e in critiques if e.scene is not None], shown)
        rewrites = [rewriter_example(rng) for _ in range(recipe.batch - looks)]
        written = answer_loss(*collate(tokenizer, rewrites), None)
        metrics = {"critic": seen.item(), "rewriter": written.item()} | {
            k: v.item() for k, v in parts.items()
        }
        first, second = (0.5, 1.0) if part == "rewriter" else (1.0, 0.5)
        return first * seen + second * written + 0.5 * torch.stack(list(parts.values())).sum(), metrics

    loss = sight_loss if part == "vision" else joint_loss
    for _ in recipe.run(trainee, loss, "lvlm"):
        pass
    model.tie_weights()
    save(recipe.out / "model", model.cpu().eval(), tokenizer)
    return recipe.losses
