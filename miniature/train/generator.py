"""Recipe of the text-to-image model: flow matching in diffusers' SD3 classes, with a layout head.

Flow matching alone learns slowly which word belongs to which place. While training, a linear layer on the hidden
states of the third block predicts for each image token which icon covers it, and another on their mean the place, the
weather and the light. Both are discarded afterwards, so the pipeline is the stock one. The architecture is that of the
configs in `weights/generator`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from numpy.random import Generator as Rng
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from .. import world
from ..codec import PatchAutoencoder
from ..judge import WEIGHTS
from .common import Heads, Loss, Recipe, draw, layout, to_tensor

SHIPPED = WEIGHTS / "generator"


def build_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One token a word, cut at `length`; case and punctuation don't count."""
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
        tokenizer_object=tokenizer, model_max_length=length, pad_token="<pad>", unk_token="<unk>",
        bos_token="<bos>", eos_token="<eos>", padding_side="right", truncation_side="right",
    )  # fmt: skip


class Trainee(nn.Module):
    """Everything that learns: transformer, text encoder, and the two heads; with random weights."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPTextConfig.from_pretrained(SHIPPED / "text_encoder", dtype=torch.float32)
        self.tokenizer = build_tokenizer(config.max_position_embeddings)
        config.vocab_size = len(self.tokenizer)
        shape = SD3Transformer2DModel.load_config(SHIPPED / "transformer")
        self.transformer = SD3Transformer2DModel.from_config(shape)
        # diffusers leaves these random; adaptive norms must start as the identity and the output as zero.
        for name, module in self.transformer.named_modules():
            adaptive = name.endswith("linear") and "norm" in name
            if isinstance(module, nn.Linear) and (adaptive or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.text_encoder = CLIPTextModelWithProjection(config)
        # CLIP's own 0.02 leaves words almost equal; from scratch they have to differ from the first step.
        nn.init.normal_(self.text_encoder.get_input_embeddings().weight, std=0.3)
        self.heads = Heads(self.transformer.inner_dim)
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

    def loss(self, codec: PatchAutoencoder, rng: Rng, batch: int, device: str) -> Loss:
        """Flow matching (conditional velocity, logit-normal times) plus the two heads' cross-entropies."""
        scenes, pixels = draw(rng, batch, world.FOLDS["generator"])
        captions = [world.caption(rng, scene, world.sample_named(rng, scene)) for scene in scenes]
        x0 = codec.encode(to_tensor(pixels).to(device)).latent_dist.mode()
        noise = torch.randn_like(x0)
        # A picture's mean colour shows through noise until t is almost 1, so with a plain logit-normal
        # the network does not learn it from the words: a quarter of the batch lies in [0.9, 1].
        t = torch.sigmoid(torch.randn(batch, device=device) + 0.5)
        late = torch.rand(batch, device=device) < 0.25
        t = torch.where(late, 0.9 + 0.1 * torch.rand(batch, device=device), t)
        told = torch.rand(batch) >= 0.1
        texts = [caption if kept else "" for caption, kept in zip(captions, told.tolist(), strict=True)]
        embeds, pooled = self.encode(texts, device)
        part = t[:, None, None, None]
        self._hidden.clear()
        velocity = self.transformer(
            hidden_states=(1 - part) * x0 + part * noise, timestep=t * 1000, encoder_hidden_states=embeds,
            pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        # Icons are a third of the picture and nearly all of its difficulty.
        covers = torch.from_numpy(np.stack([layout(scene) for scene in scenes])).to(device)
        emphasis = torch.where(covers == 0, 0.7, 1.6).view(-1, 1, 8, 8)
        emphasis = F.interpolate(emphasis, scale_factor=3, mode="nearest")
        flow = ((velocity.float() - (noise - x0)).square() * emphasis).mean()
        things, whole = self.heads.losses(self._hidden.pop(), scenes, told.to(device))
        metrics = {"flow": flow.item(), "things": things.item(), "whole": whole.item()}
        return flow + 0.5 * things + 0.3 * whole, metrics


def save_pipeline(trainee: Trainee, codec: PatchAutoencoder, out: Path) -> None:
    """Write a folder that `StableDiffusion3Pipeline.from_pretrained` loads; the models become float16."""
    trainee.cpu().half()
    pipeline = StableDiffusion3Pipeline(
        transformer=trainee.transformer, vae=codec.cpu().half(),
        text_encoder=trainee.text_encoder, tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.text_encoder, tokenizer_2=trainee.tokenizer, text_encoder_3=None, tokenizer_3=None,
        # Sampling spends more of its steps at high noise, for the same reason that training does.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    )  # fmt: skip
    pipeline.save_pretrained(out)
    index = json.loads((out / "model_index.json").read_text())
    index["vae"] = ["emoloop.miniature.codec", "PatchAutoencoder"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(SHIPPED / "emoloop.json", out)


def _go_on(trainee: Trainee, init: Path) -> PatchAutoencoder:
    """Load what an earlier run learned: a saved pipeline (the heads begin anew) or a finished run's checkpoint.

    The codec comes along: one that is fitted again may flip the sign of a component, and the network
    would have to learn its input and output again.
    """
    if not init.is_dir():
        state = torch.load(init, weights_only=True, map_location="cpu")["average"]
        trainee.load_state_dict(state, strict=False)
        return PatchAutoencoder.from_pretrained(init.parent / "model" / "vae")
    for name in ("transformer", "text_encoder"):
        part = getattr(trainee, name)
        part.load_state_dict(type(part).from_pretrained(init / name).state_dict())
    return PatchAutoencoder.from_pretrained(init / "vae")


def train(recipe: Recipe) -> None:
    """Train and write the pipeline to `recipe.out / "model"`."""
    torch.manual_seed(recipe.seed)
    trainee = Trainee()
    if recipe.init is not None:
        codec = _go_on(trainee, recipe.init)
    else:
        codec = PatchAutoencoder()
        pixels = draw(np.random.default_rng([1, 0]), 1000, world.FOLDS["generator"])[1]
        print(f"codec: {codec.fit(pixels):.1f} dB")
    trainee, codec = trainee.to(recipe.device), codec.to(recipe.device)
    for name in ("transformer", "text_encoder"):
        print(f"{name}: {sum(p.numel() for p in getattr(trainee, name).parameters()):,} parameters")

    def loss(step: int) -> Loss:
        rng = np.random.default_rng([recipe.seed, step])
        return trainee.loss(codec, rng, recipe.batch, recipe.device)

    recipe.run(trainee, loss, "generator")
    save_pipeline(trainee, codec, recipe.out / "model")
