"""Recipe of the text-to-image model: flow matching in diffusers' SD3 classes, with a layout head.

Flow matching alone binds words to places very slowly. While training, a linear layer on the hidden states of
the third block predicts for each image token which icon covers it, and another on their mean the place, the
weather and the light; both are thrown away afterwards and the pipeline stays stock.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from .. import world
from ..codec import PatchAutoencoder
from .common import Recipe

LENGTH = 32
TEXT_WIDTH = 128
WIDTH = 192
#: Sampling spends more of its steps at high noise, for the same reason that training does.
SHIFT = 2.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; case and punctuation don't count."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = {word: index for index, word in enumerate([*special, *world.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LENGTH, pad_token="<pad>", unk_token="<unk>",
        bos_token="<bos>", eos_token="<eos>", padding_side="right", truncation_side="right",
    )  # fmt: skip


def build_text_encoder(vocabulary: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder of 0.7 M parameters."""
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=LENGTH,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config)
    # CLIP's own 0.02 leaves words almost equal; from scratch they have to differ from the first step.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


def build_transformer() -> SD3Transformer2DModel:
    """SD3's transformer with 64 image tokens of 12 × 12 pixels."""
    transformer = SD3Transformer2DModel(
        sample_size=24, patch_size=3, in_channels=16, out_channels=16, num_layers=6, attention_head_dim=32,
        num_attention_heads=6, caption_projection_dim=WIDTH, joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    # diffusers leaves these random; adaptive norms must start as the identity and the output as zero.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (
            (name.endswith("linear") and "norm" in name) or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


#: What tells a whole picture, in the order of `whole`.
FACTORS = (world.PLACES, world.WEATHER, world.BRIGHTNESS, world.SATURATION, world.TINT)
#: Classes of `layout`: background and every icon.
THINGS = 1 + len(world.SUBJECTS) + len(world.COMPANIONS)


class _Heads(nn.Module):
    """Predicts what covers each token, and what the whole picture is like. Lives only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.things = nn.Linear(WIDTH, THINGS)
        self.whole = nn.ModuleList(nn.Linear(WIDTH, len(table)) for table in FACTORS)


_SUBJECT_INDEX = {name: 1 + i for i, name in enumerate(world.SUBJECTS)}
_COMPANION_INDEX = {name: 1 + len(world.SUBJECTS) + i for i, name in enumerate(world.COMPANIONS)}


def layout(scene: world.Scene) -> np.ndarray:
    """Which icon covers each of the 8 × 8 image tokens; 0 is background."""
    grid = np.zeros((8, 8), np.int64)

    def cover(left: int, top: int, size: int, index: int) -> None:
        grid[top // 12 : (top + size) // 12, left // 12 : (left + size) // 12] = index

    for placed in scene.companions:
        cover(*world.corner(placed), _COMPANION_INDEX[placed.name])
    cover(*world.SUBJECT_BOX, _SUBJECT_INDEX[scene.subject])
    return grid.reshape(-1)


def whole(scene: world.Scene) -> list[int]:
    """Indices of place, weather, brightness, saturation and tint."""
    values = (scene.place, scene.weather, scene.brightness, scene.saturation, scene.tint)
    return [list(table).index(value) for table, value in zip(FACTORS, values, strict=True)]


def draw_batch(seed: int, step: int, size: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Captions, pictures (size, 96, 96, 3), token labels (size, 64) and whole-picture labels (size, 5)."""
    rng = np.random.default_rng([seed, step])
    scenes = [world.sample_scene(rng, world.FOLDS["generator"]) for _ in range(size)]
    captions = [world.caption(rng, s, world.sample_named(rng, s)) for s in scenes]
    pixels = np.stack([world.render(s) for s in scenes])
    return captions, pixels, np.stack([layout(s) for s in scenes]), np.array([whole(s) for s in scenes])


class Trainee(nn.Module):
    """Everything that learns: transformer, text encoder, and the two heads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(len(tokenizer))
        self.heads = _Heads()
        self._hidden: list[Tensor] = []
        self.transformer.transformer_blocks[2].register_forward_hook(
            lambda _m, _i, out: self._hidden.append(out[1])
        )

    def encode(self, captions: list[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """What the stock pipeline gives for these captions when both its encoders are ours and T5 is absent."""
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = self.text_encoder(ids.to(device), output_hidden_states=True)
        tokens, pooled = out.hidden_states[-2], out.text_embeds
        return torch.cat([tokens, tokens], -1), torch.cat([pooled, pooled], -1)

    def loss(self, codec: PatchAutoencoder, recipe: Recipe, step: int) -> tuple[Tensor, dict[str, float]]:
        """Flow matching (conditional velocity, logit-normal times) plus the two heads' cross-entropies."""
        captions, pixels, tokens, picture = draw_batch(recipe.seed, step, recipe.batch)
        device = recipe.device
        x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = codec.encode(x).latent_dist.mode()
        noise = torch.randn_like(x0)
        # A picture's mean colour shows through noise until t is almost 1, so a plain logit-normal never makes
        # the net ask the words for it: a quarter of the batch lies in [0.9, 1].
        t = torch.sigmoid(torch.randn(len(x0), device=device) + 0.5)
        t = torch.where(
            torch.rand(len(x0), device=device) < 0.25, 0.9 + 0.1 * torch.rand(len(x0), device=device), t
        )
        dropped = torch.rand(len(x0)) < 0.1
        texts = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        embeds, pooled = self.encode(texts, device)
        noisy = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        self._hidden.clear()
        velocity = self.transformer(
            hidden_states=noisy, timestep=t * 1000, encoder_hidden_states=embeds, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip
        hidden = self._hidden.pop()
        labels = torch.from_numpy(tokens).to(device)
        # Icons are a third of the picture and nearly all of its difficulty.
        emphasis = torch.where(labels == 0, 0.7, 1.6).view(-1, 1, 8, 8)
        emphasis = F.interpolate(emphasis, scale_factor=3, mode="nearest")
        flow = ((velocity.float() - (noise - x0)).square() * emphasis).mean()
        weight = torch.where(labels == 0, 0.15, 1.0) * (~dropped).to(device)[:, None]
        things = F.cross_entropy(self.heads.things(hidden).flatten(0, 1), labels.flatten(), reduction="none")
        things = (things * weight.flatten()).sum() / weight.sum().clamp_min(1)
        mean, target = (
            hidden.mean(1)[~dropped.to(device)],
            torch.from_numpy(picture).to(device)[~dropped.to(device)],
        )
        overall = (
            sum(
                (F.cross_entropy(head(mean), target[:, i]) for i, head in enumerate(self.heads.whole)),
                torch.zeros((), device=device),
            )
            / 5
        )
        metrics = {"flow": flow.item(), "things": things.item(), "whole": overall.item()}
        return flow + 0.5 * things + 0.3 * overall, metrics


def save_pipeline(trainee: Trainee, codec: PatchAutoencoder, out: Path) -> None:
    """Write a folder that `StableDiffusion3Pipeline.from_pretrained` loads, in float16."""
    pipeline = StableDiffusion3Pipeline(
        transformer=trainee.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=codec,
        text_encoder=trainee.text_encoder, tokenizer=trainee.tokenizer, text_encoder_2=trainee.text_encoder,
        tokenizer_2=trainee.tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    import copy

    half = StableDiffusion3Pipeline(
        **{
            k: copy.deepcopy(v).half() if isinstance(v, nn.Module) else v
            for k, v in pipeline.components.items()
        }
    )
    half.save_pretrained(out, safe_serialization=True)
    index = json.loads((out / "model_index.json").read_text())
    index["vae"] = ["emoloop.miniature.codec", "PatchAutoencoder"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    absent = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
    preset = {
        "steps": 14, "guidance": 3.0, "height": world.SIZE, "width": world.SIZE, "micro_batch": 8,
        "call": {"max_sequence_length": 0}, "load": dict.fromkeys(absent),
    }  # fmt: skip
    (out / "emoloop.json").write_text(json.dumps(preset, indent=2) + "\n")


def _go_on(trainee: Trainee, init: Path) -> PatchAutoencoder:
    """Load what an earlier run learned: a saved pipeline (the heads begin anew) or a finished run's checkpoint.

    The codec comes along: one that is fitted again may flip the sign of a component, and the net would have to
    learn its ends anew.
    """
    if init.is_dir():
        trainee.transformer.load_state_dict(
            SD3Transformer2DModel.from_pretrained(init / "transformer").state_dict()
        )
        trainee.text_encoder.load_state_dict(
            CLIPTextModelWithProjection.from_pretrained(init / "text_encoder").state_dict()
        )
        return PatchAutoencoder.from_pretrained(init / "vae")
    trainee.load_state_dict(torch.load(init, weights_only=True, map_location="cpu")["average"], strict=False)
    return PatchAutoencoder.from_pretrained(init.parent / "model" / "vae")


def train(recipe: Recipe) -> list[float]:
    """Train and write the pipeline to `recipe.out / "model"`."""
    torch.manual_seed(recipe.seed)
    codec = PatchAutoencoder()
    decibels = codec.fit(draw_batch(1, 0, 1000)[1])
    print(f"codec: {decibels:.1f} dB")
    trainee = Trainee(build_tokenizer())
    if recipe.init is not None:
        codec = _go_on(trainee, recipe.init)
    trainee, codec = trainee.to(recipe.device), codec.to(recipe.device)
    count = (
        sum(p.numel() for p in trainee.transformer.parameters()),
        sum(p.numel() for p in trainee.text_encoder.parameters()),
    )
    print(f"parameters: transformer {count[0]:,}, text encoder {count[1]:,}")
    for _ in recipe.run(trainee, lambda step: trainee.loss(codec, recipe, step), "generator"):
        pass
    save_pipeline(trainee.cpu(), codec.cpu(), recipe.out / "model")
    return recipe.losses
