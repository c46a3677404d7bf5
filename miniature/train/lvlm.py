"""Recipe of the vision-language model: Idefics3 from scratch, critic and rewriter in one.

Every step sees critiques of freshly rendered scenes, spoiled a little as a generator would spoil them, and
simulated rewriting episodes (`emoloop.miniature.episodes`). Head size 32 and the plain chat template are what
vLLM's CPU attention and transformers both take. The architecture, the chat template and the processors are those in
`weights/lvlm`: the image is 8 × 8 patches, shuffled to 16 tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import Generator as Rng
from numpy.typing import NDArray
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .. import law, world
from ..episodes import Example, critic_example, critique_of, described, rewriter_example
from ..judge import WEIGHTS
from ..world import Scene
from .common import Heads, Loss, Recipe, fitted_codec, spoil, to_tensor

SHIPPED = WEIGHTS / "lvlm"
IMAGE_TOKENS = 16
#: Pixels by which a painted picture is moved at most while training.
MOVED = 2
# The order fixes the ids: pad, end of answer, roles, then what Idefics3's processor puts around an image.
SPECIALS = [
    "<|pad|>", "<end_of_utterance>", "<|system|>", "<|user|>", "<|assistant|>",
    "<image>", "<fake_token_around_image>", "<global-img>",
]  # fmt: skip
# Digits and signs stand alone, so that a number is read and scored one character at a time.
SPLIT = r"\p{N}|[+\-]|[^\r\n\p{L}\p{N}+\-]?\p{L}+| ?[^\s\p{L}\p{N}+\-]+|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    corpus += [f" {word}" for word in (*world.words(), *world.COMPANIONS, *world.SUBJECTS)] * 20
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
    fast.chat_template = (SHIPPED / "chat_template.jinja").read_text()
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """The shipped architecture (about 3.5 M parameters) with random weights."""
    config = Idefics3Config.from_pretrained(SHIPPED, dtype=torch.float32)
    config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(SHIPPED)
    return model


def save(folder: Path, model: Idefics3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a folder that transformers and vLLM load; the model becomes float16.

    The image processor's name without "Pil" lets transformers pick PIL or torchvision by what is installed; a
    96 × 96 picture passes every resize untouched, hence equal pixels in both.
    """
    model.cpu().eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "emoloop.json"):
        shutil.copy(SHIPPED / name, folder)


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels (-100 outside the answers), padded on the right, each (batch, length)."""
    prompts = tokenizer([prompt_text(e) for e in examples], add_special_tokens=False).input_ids
    answers = tokenizer(
        [e.answer + "<end_of_utterance>" for e in examples], add_special_tokens=False
    ).input_ids
    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


class _Sight(Heads):
    """The heads of the vision tower: beside icons and factors, what colour and the whole picture feel like.

    A vision tower learns slowly from the answers' loss alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.affect = nn.Linear(width, 4)

    def loss(self, patches: Tensor, scenes: Sequence[Scene], pixels: Sequence[NDArray[np.uint8]]) -> Loss:
        """Sum of the cross-entropies and the squared error of `patches`, shape (batch, 64, width)."""
        truth = [(*law.colour_affect(p), *law.affect(s, p)) for s, p in zip(scenes, pixels, strict=True)]
        felt = self.affect(patches.mean(1)).float()
        things, whole = self.losses(patches, scenes)
        parts = {"things": things, "whole": whole, "felt": F.mse_loss(felt, torch.tensor(truth).to(felt))}
        return torch.stack(list(parts.values())).sum(), {name: part.item() for name, part in parts.items()}


class Painted:
    """Pictures that the generator painted, with scenes that are known (`miniature.build critic-data`).

    Args:
        folder: Where they lie; those that are held out there are left out.
    """

    def __init__(self, folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        rows = [row for row in rows if row["split"] == "train"]
        self.scenes = [described(row["analysis"]) for row in rows]
        self.pixels = np.stack([np.asarray(Image.open(folder / it["image"]).convert("RGB")) for it in rows])

    def critiques(self, rng: Rng, count: int) -> list[Example]:
        """Critiques of some for prompts that may or may not fit; moved, so that none is learned by heart."""
        which = rng.integers(len(self.scenes), size=count)
        moves = rng.integers(2 * MOVED + 1, size=(count, 2))
        wider = np.pad(self.pixels[which], ((0, 0), (MOVED, MOVED), (MOVED, MOVED), (0, 0)), "edge")
        return [
            critique_of(rng, self.scenes[i], one[y : y + world.SIZE, x : x + world.SIZE])
            for i, one, (y, x) in zip(which, wider, moves, strict=True)
        ]


def train(
    recipe: Recipe, part: Literal["all", "vision", "rewriter"] = "all", pictures: Path | None = None
) -> None:
    """Train and write the model to `recipe.out / "model"`.

    Args:
        recipe: The run.
        part: "vision" teaches the vision tower alone: a step then costs a fifth, so that it sees many more
            pictures; a second run takes its checkpoint as `init`. "rewriter" shows three rewrites for each
            critique, "all" the other way round.
        pictures: Folder of painted pictures. Half of the critiques are of them then; "vision" teaches the connector
            too, and each step takes some answers beside what the heads see.
    """
    painted = Painted(pictures) if pictures else None
    torch.manual_seed(recipe.seed)
    device = recipe.device
    before = recipe.init and (recipe.init if recipe.init.is_dir() else recipe.init.parent / "model")
    # What goes on keeps its words, whatever the corpus is by now.
    if before and not before.is_dir():
        raise FileNotFoundError(f"{before} holds the tokenizer of {recipe.init}: let that training end first")
    tokenizer = AutoTokenizer.from_pretrained(before) if before else build_tokenizer(0)
    model = build_model(tokenizer).to(device)
    model.train()
    # The CPU's fused attention has a backward pass that takes half of the step at these sizes.
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    codec = fitted_codec(recipe.seed)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}; vocabulary {len(tokenizer)}")
    # The JSON syntax is learned at once; numbers are sums, which are hard: their characters weigh more.
    weight = torch.ones(model.config.text_config.vocab_size, device=device)
    weight[tokenizer.convert_tokens_to_ids(list("0123456789+-"))] = 4.0

    def answer_loss(examples: list[Example], **pictures: Tensor) -> Tensor:
        ids, labels = (tensor.to(device) for tensor in collate(tokenizer, examples))
        hidden = model.model(
            input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), use_cache=False, **pictures
        ).last_hidden_state
        told = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][told]).float()
        return F.cross_entropy(logits, labels[:, 1:][told], weight=weight)

    vision = model.model.vision_model
    sight = _Sight(model.config.vision_config.hidden_size).to(device)
    trainee = nn.ModuleDict({"model": model, "sight": sight})
    patches: list[Tensor] = []
    vision.register_forward_hook(lambda _m, _i, out: patches.append(out.last_hidden_state))
    if recipe.init is not None and recipe.init.is_dir():
        model.load_state_dict(Idefics3ForConditionalGeneration.from_pretrained(recipe.init).state_dict())
    elif recipe.init is not None:
        state = torch.load(recipe.init, map_location=device, weights_only=True)["average"]
        trainee.load_state_dict(state, strict=False)
    connector = model.model.connector
    if part == "vision":
        model.requires_grad_(False)
        vision.requires_grad_(True)
        connector.requires_grad_(painted is not None)

    def critiques(rng: Rng, count: int) -> tuple[list[Example], Tensor]:
        """Critiques, half of them of painted pictures where there are some, and what the vision tower is shown."""
        told = painted.critiques(rng, count // 2) if painted else []
        fresh = count - len(told)
        examples = [critic_example(rng, world.FOLDS["critic"]) for _ in range(fresh)] + told
        pixels = np.stack([e.pixels for e in examples if e.pixels is not None])
        x = to_tensor(pixels)
        x[:fresh] = spoil(rng, codec, pixels[:fresh])
        return examples, x.to(device)

    def looked(examples: Sequence[Example]) -> Loss:
        """The heads' loss on what the vision tower saw last."""
        known = [(e.scene, e.pixels) for e in examples if e.scene is not None and e.pixels is not None]
        return sight.loss(patches.pop(), *zip(*known, strict=True))

    def sight_loss(step: int) -> Loss:
        rng = np.random.default_rng([recipe.seed, step])
        examples, x = critiques(rng, 2 * recipe.batch)
        patches.clear()
        vision(pixel_values=x)
        seen, metrics = looked(examples)
        if painted is None:
            return seen, metrics
        # A quarter renders.
        some = slice(recipe.batch - 4, recipe.batch + 12)
        said = answer_loss(examples[some], pixel_values=x[some, None])
        return seen + 2 * said, metrics | {"critic": said.item()}

    def joint_loss(step: int) -> Loss:
        rng = np.random.default_rng([recipe.seed, step])
        looks = recipe.batch // 4 if part == "rewriter" else recipe.batch * 3 // 4
        examples, x = critiques(rng, looks)
        patches.clear()
        said = answer_loss(examples, pixel_values=x[:, None])
        seen, parts = looked(examples)
        written = answer_loss([rewriter_example(rng) for _ in range(recipe.batch - looks)])
        first, second = (0.5, 1.0) if part == "rewriter" else (1.0, 0.5)
        metrics = {"critic": said.item(), "rewriter": written.item(), **parts}
        return first * said + second * written + 0.5 * seen, metrics

    recipe.run(trainee, sight_loss if part == "vision" else joint_loss, "lvlm")
    model.tie_weights()
    save(recipe.out / "model", model, tokenizer)
