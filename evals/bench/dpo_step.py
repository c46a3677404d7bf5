"""The DPO step with cached latents against the step of diffusers' `train_diffusion_dpo.py`, same maths, same batch.

Both sides train the same network from the same weights on the same pairs, noise and timesteps; the loss has to
agree. The baseline does in each step what the script does: decode the pictures, encode them with the VAE, encode
the captions, then student forward, reference forward through peft's own switch, backward, optimizer. Ours is
`rl`'s own path: loader, cache, policy, objective. The two take turns, so that a busy machine slows both.

Ours saves twice: latents and embeddings come from the cache, and with a finite number of noise draws per pair
(`objective.draws`) the reference's errors are computed when a draw is first met and remembered after that.
`ratio` is the step once they are, as it is for most of a training of several epochs; `first_ratio` is the step
that still computes them.

The network is Stable Diffusion 1.5 at a tenth of its widths (UNet 32-64-128-128, heads as wide as the real ones,
VAE 12-24-48-48, text encoder 12 layers of 64) on 128 × 128 pixels. By FLOPs the VAE's share is then 1.2 forward
passes of the UNet; in SD1.5 at 512 × 512 it is 1.4.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...domain import EmotionTarget
from ...rl.data.cache import Cache
from ...rl.data.examples import Example
from ...rl.data.loader import Loader
from ...rl.objectives import load_objective
from ...rl.policy import Policy
from ...tools.diffusion.conditioners import EmotionConditioner
from ...tools.diffusion.families import family_of
from ...tools.fingerprint import versions

#: The settings of public LoRA recipes for the script (its own default beta, 5000, is for full fine-tuning); the
#: script's scale of beta is half of ours.
_BETA, _RANK, _LR = 2500.0, 8, 1e-5

#: Noise draws of a pair.
_DRAWS = 2


def main(steps: int = 6, pairs: int = 4, threads: int = 1, size: int = 128) -> dict[str, Any]:
    """DPO step with cached latents against diffusers' script.

    Args:
        steps: Timed steps of each side; the first of each is left out.
        pairs: Preference pairs in a batch.
        threads: Threads of torch.
        size: Pixels of an image's side.

    Returns:
        The document with `figures`: ratio, ours_seconds, baseline_seconds, loss_difference, and first_ratio and
        first_seconds of a step whose draws are new.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pictures = _pictures(Path(folder), pairs, size)
            ours = _Ours(Path(folder), pictures, size)
            first = _Ours(Path(folder), pictures, size, forgets=True)
            sides: dict[str, _Side] = {"ours": ours, "first": first, "baseline": _Baseline(pictures, size)}
            ours.fill_memory()
            apart: list[float] = []
            for step in range(steps + 1):
                draws = ours.draws_of(step)
                losses = [side.step(step, *draws) for side in sides.values()]
                apart.append(max(losses) - min(losses))
    finally:
        torch.set_num_threads(before)
    parts = {name: side.medians() for name, side in sides.items()}
    seconds = {name: part.pop("step") for name, part in parts.items()}
    figures = {
        "ratio": seconds["baseline"] / seconds["ours"],
        "ours_seconds": seconds["ours"],
        "baseline_seconds": seconds["baseline"],
        "loss_difference": max(apart),
        "first_ratio": seconds["baseline"] / seconds["first"],
        "first_seconds": seconds["first"],
    }
    made_by = {"beta": _BETA, "rank": _RANK, "lr": _LR, "draws": _DRAWS}
    return {
        "figures": figures, "parts": parts, "n": steps, "training": made_by,
        "versions": versions("torch", "diffusers", "peft"),
    }  # fmt: skip


def _pipeline(size: int) -> StableDiffusionPipeline:
    """SD1.5's shape at a tenth of its widths, the same weights at each call."""
    torch.manual_seed(0)
    # A CLIP tokenizer over letters, padded to 77 like the real one.
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    letters += [f"<{n}>" for n in range(60 - len(letters))] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    unet = UNet2DConditionModel(
        sample_size=size // 8, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128, 128),
        layers_per_block=2, cross_attention_dim=64, attention_head_dim=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(12, 24, 48, 48), layers_per_block=2, latent_channels=4, norm_num_groups=4,
        sample_size=size, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=60, eos_token_id=61, pad_token_id=61,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(config).eval(), unet=unet.eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip
    return pipe


def _pictures(folder: Path, pairs: int, size: int) -> list[Path]:
    """Paths of noise as PNG: all winners, then all losers."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{side}{number}.png" for number in range(pairs) for side in "wl"]
    for path in paths:
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
    return paths[::2] + paths[1::2]


class _Side:
    """What both sides do after their loss, with a clock for each part."""

    optimizer: torch.optim.Optimizer

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        """Median seconds by part of a step, and of the `step`; the first is left out."""
        return {name: median(values[1:] or values) for name, values in self.seconds.items()}

    def loss(self, step: int, t: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, step: int, t: Tensor, noise: Tensor) -> float:
        with self.part("step"):
            loss = self.loss(step, t, noise)
            with self.part("backward"):
                loss.backward()
            with self.part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class _Ours(_Side):
    """`rl`'s own path: loader, cache, policy and objective, as in the trainer."""

    def __init__(self, folder: Path, pictures: Sequence[Path], size: int, forgets: bool = False) -> None:
        super().__init__()
        self.forgets = forgets
        network = family_of(_pipeline(size))
        self.objective: Any = load_objective("dpo", {"beta": 2 * _BETA, "draws": _DRAWS})
        self.policy = Policy(
            network, EmotionConditioner.for_embeds(network.encode("a")), rank=_RANK, alpha=_RANK, steps=2,
            guidance=1.0, size=(size, size),
        )  # fmt: skip
        _same_lora(self.policy.network.module)
        target = EmotionTarget(valence=1)
        self.examples = [
            Example("run", _caption(number), target, number=number, winner=f"w{number}", loser=f"l{number}")
            for number in range(len(pictures) // 2)
        ]
        paths = {path.stem: path for path in pictures}
        cache = Cache(folder / "cache", network, {}, (size, size), lambda name: Image.open(paths[name]))
        self.load = Loader(self.objective.required_keys, cache, torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(list(self.policy.parameters().values()), lr=_LR)

    def draws_of(self, step: int) -> tuple[Tensor, Tensor]:
        """Timesteps and noise that the objective takes in a step."""
        which = torch.randint(_DRAWS, (len(self.examples),), generator=torch.Generator().manual_seed(step))
        names = [(example.number, int(draw)) for example, draw in zip(self.examples, which, strict=True)]
        return self.objective._fixed(names, torch.empty(1, *self.policy.latent_shape), self.policy)

    def fill_memory(self) -> None:
        """Compute the reference's errors of every draw, as a first epoch does."""
        batch, seed = self.load(self.examples), 1_000_000
        while len(self.policy.memory) < _DRAWS * len(self.examples):
            with torch.no_grad():
                self.objective.loss(batch, self.policy, torch.Generator().manual_seed(seed))
            seed += 1

    def loss(self, step: int, t: Tensor, noise: Tensor) -> Tensor:
        if self.forgets:
            self.policy.memory.clear()
        with self.part("load"):
            batch = self.load(self.examples)
        with self.part("forward"):
            return self.objective.loss(batch, self.policy, torch.Generator().manual_seed(step))[0]


class _Baseline(_Side):
    """What diffusers' script does in a step."""

    def __init__(self, pictures: Sequence[Path], size: int) -> None:
        super().__init__()
        self.pictures = pictures
        self.pipe: Any = _pipeline(size)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        lora = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=targets)
        self.pipe.unet.add_adapter(lora, "student")
        _same_lora(self.pipe.unet)
        captions = [_caption(number) for number in range(len(pictures) // 2)]
        self.ids = self.pipe.tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        trained = [p for p in self.pipe.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=_LR)

    def loss(self, step: int, t: Tensor, noise: Tensor) -> Tensor:
        unet, vae = self.pipe.unet, self.pipe.vae
        with self.part("decode"):
            pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in self.pictures])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.part("vae"), torch.no_grad():
            # The script samples here; the mode costs the same and makes the losses comparable.
            latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(8)])
            latents = latents * vae.config.scaling_factor
        with self.part("text"), torch.no_grad():
            told = self.pipe.text_encoder(self.ids)[0].repeat(2, 1, 1)
        with self.part("forward"):
            t, noise = t.repeat(2), noise.repeat(2, 1, 1, 1)
            noisy = self.pipe.scheduler.add_noise(latents, noise, t)
            model = F.mse_loss(unet(noisy, t, told).sample, noise, reduction="none").mean((1, 2, 3))
            unet.disable_adapters()
            with torch.no_grad():
                reference = F.mse_loss(unet(noisy, t, told).sample, noise, reduction="none").mean((1, 2, 3))
            unet.enable_adapters()
            (mw, ml), (rw, rl) = model.chunk(2), reference.chunk(2)
            return -F.logsigmoid(_BETA * ((rw - rl) - (mw - ml))).mean()


def _caption(number: int) -> str:
    return f"picture number {number}"


def _same_lora(unet: Any) -> None:
    """The same LoRA weights on both sides, and none at zero, so that the loss depends on them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(unet.named_parameters()):
            if ".student." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
