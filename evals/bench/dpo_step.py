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

import io
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

#: The settings of public LoRA recipes for the script (its own default beta, 5000, is for full fine-tuning).
_BETA, _RANK, _LR = 2500.0, 8, 1e-5

#: Noise draws of a pair.
_DRAWS = 2


class _Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name].append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        return {name: round(median(values[1:] or values), 4) for name, values in self.parts.items()}


def main(steps: int = 6, pairs: int = 4, threads: int = 1, size: int = 128) -> dict[str, Any]:
    """DPO step with cached latents against diffusers' script.

    Args:
        steps: Timed steps of each side; the first of each is left out.
        pairs: Preference pairs in a batch.
        threads: Threads of torch.
        size: Pixels of an image's side.

    Returns:
        The document with `figures`: ratio, ours_seconds, baseline_seconds, loss_difference, and the first
        meeting's first_ratio and first_seconds.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = _Ours(Path(folder), pairs, size)
            sides = {
                "ours": ours,
                "first": _Ours(Path(folder), pairs, size, forgets=True),
                "baseline": _Baseline(pairs, size),
            }
            ours.fill_memory()
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            apart: list[float] = []
            for step in range(steps + 1):
                t, noise = ours.draws_of(step)
                losses = []
                for name, side in sides.items():
                    start = time.perf_counter()
                    losses.append(side.step(step, t, noise))
                    seconds[name].append(time.perf_counter() - start)
                apart.append(max(losses) - min(losses))
            typical = {name: median(values[1:]) for name, values in seconds.items()}
            parts = {name: side.clock.medians() for name, side in sides.items()}
    finally:
        torch.set_num_threads(before)
    return {
        "figures": {
            "ratio": typical["baseline"] / typical["ours"],
            "ours_seconds": typical["ours"],
            "baseline_seconds": typical["baseline"],
            "loss_difference": max(apart),
            "first_ratio": typical["baseline"] / typical["first"],
            "first_seconds": typical["first"],
        },
        "parts": parts,
        "settings": {
            "steps": steps,
            "pairs": pairs,
            "threads": threads,
            "size": size,
            "beta": _BETA,
            "draws": _DRAWS,
        },
        "n": steps,
        "seeds": [0],
        "device": f"cpu, {os.cpu_count()} cores",
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from ...tools.fingerprint import versions

    return versions("torch", "diffusers", "peft")


def _pipeline(size: int) -> Any:
    """SD1.5's shape at a tenth of its widths, the same weights at each call."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=size // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        block_out_channels=(12, 24, 48, 48),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=60,
        eos_token_id=61,
        pad_token_id=61,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=_Tokenizer.make(),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        ),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    for component in (unet, vae, pipe.text_encoder):
        component.eval()
    return pipe


class _Tokenizer:
    """A CLIP tokenizer over letters, padded to 77 like the real one."""

    @staticmethod
    def make() -> Any:
        from string import ascii_lowercase

        from transformers import CLIPTokenizer

        letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
        letters += [f"<{n}>" for n in range(60 - len(letters))] + ["<|startoftext|>", "<|endoftext|>"]
        vocab = {letter: number for number, letter in enumerate(letters)}
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _pictures(pairs: int, size: int) -> list[tuple[bytes, bytes, str]]:
    """(winner, loser, caption) with PNG bytes, as a parquet of pick-a-pic would bring them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = []
    for number in range(pairs):
        pngs = []
        for _ in range(2):
            stream = io.BytesIO()
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
            pngs.append(stream.getvalue())
        rows.append((pngs[0], pngs[1], f"picture number {number}"))
    return rows


class _Ours:
    """`rl`'s own path, as the trainer walks it."""

    def __init__(self, folder: Path, pairs: int, size: int, forgets: bool = False) -> None:
        import torch
        from PIL import Image

        from ...domain import EmotionTarget
        from ...rl.data.cache import Cache
        from ...rl.data.examples import Example
        from ...rl.data.loader import Loader
        from ...rl.objectives import load_objective
        from ...rl.policy import Policy
        from ...tools.diffusion.conditioners import EmotionConditioner
        from ...tools.diffusion.families import family_of

        self.clock, self.forgets = _Clock(), forgets
        network = family_of(_pipeline(size))
        self.objective = load_objective("dpo", {"beta": _BETA, "draws": _DRAWS})
        self.policy = Policy(
            network, EmotionConditioner.for_embeds(network.encode("a")), rank=_RANK, alpha=_RANK, steps=2,
            guidance=1.0, size=(size, size),
        )  # fmt: skip
        _same_lora(self.policy.network.module)
        paths: dict[str, Path] = {}
        self.examples = []
        for number, (winner, loser, caption) in enumerate(_pictures(pairs, size)):
            for name, png in ((f"w{number}", winner), (f"l{number}", loser)):
                paths[name] = folder / f"{name}.png"
                paths[name].write_bytes(png)
            self.examples.append(
                Example(
                    "run",
                    caption,
                    EmotionTarget(valence=1),
                    number=number,
                    winner=f"w{number}",
                    loser=f"l{number}",
                )
            )
        cache = Cache(folder / "cache", network, {}, (size, size), lambda name: Image.open(paths[name]))
        self.load = Loader(self.objective.required_keys, cache, torch.device("cpu"))
        parameters = list(self.policy.parameters().values())
        self.optimizer = torch.optim.AdamW(parameters, lr=_LR)

    def draws_of(self, step: int) -> tuple[Any, Any]:
        """Timesteps and noise that the objective takes in a step."""
        import torch

        which = torch.randint(_DRAWS, (len(self.examples),), generator=torch.Generator().manual_seed(step))
        names = [(example.number, int(draw)) for example, draw in zip(self.examples, which, strict=True)]
        like = torch.empty(1, *self.policy.latent_shape)
        return self.objective._fixed(names, like, self.policy)  # type: ignore[attr-defined]

    def fill_memory(self) -> None:
        """Meet every draw once, as a first epoch does."""
        import torch

        batch, seed = self.load(self.examples), 1_000_000
        while len(self.policy.memory) < _DRAWS * len(self.examples):
            with torch.no_grad():
                self.objective.loss(batch, self.policy, torch.Generator().manual_seed(seed))
            seed += 1

    def step(self, step: int, t: Any, noise: Any) -> float:
        import torch

        if self.forgets:
            self.policy.memory.clear()
        with self.clock.part("load"):
            batch = self.load(self.examples)
        with self.clock.part("forward"):
            loss, _ = self.objective.loss(batch, self.policy, torch.Generator().manual_seed(step))
        with self.clock.part("backward"):
            loss.backward()
        with self.clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class _Baseline:
    """What diffusers' script does in a step, in our words."""

    def __init__(self, pairs: int, size: int) -> None:
        import torch
        from peft import LoraConfig

        self.clock = _Clock()
        self.pipe: Any = _pipeline(size)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False)
        self.pipe.unet.add_adapter(
            LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
            "student",
        )
        _same_lora(self.pipe.unet)
        self.rows = _pictures(pairs, size)
        captions = [caption for _, _, caption in self.rows]
        self.ids = self.pipe.tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        trained = [p for p in self.pipe.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=_LR)

    def step(self, step: int, t: Any, noise: Any) -> float:
        import numpy as np
        import torch
        import torch.nn.functional as F
        from PIL import Image

        unet, vae = self.pipe.unet, self.pipe.vae
        with self.clock.part("decode"):
            pngs = [row[0] for row in self.rows] + [row[1] for row in self.rows]
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.clock.part("vae"), torch.no_grad():
            # The script samples here; the mode costs the same and makes the losses comparable.
            latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(8)])
            latents = latents * vae.config.scaling_factor
        with self.clock.part("text"), torch.no_grad():
            told = self.pipe.text_encoder(self.ids)[0].repeat(2, 1, 1)
        with self.clock.part("forward"):
            t, noise = t.repeat(2), noise.repeat(2, 1, 1, 1)
            noisy = self.pipe.scheduler.add_noise(latents, noise, t)
            model = F.mse_loss(unet(noisy, t, told).sample, noise, reduction="none").mean((1, 2, 3))
            unet.disable_adapters()
            with torch.no_grad():
                reference = F.mse_loss(unet(noisy, t, told).sample, noise, reduction="none").mean((1, 2, 3))
            unet.enable_adapters()
            (mw, ml), (rw, rl) = model.chunk(2), reference.chunk(2)
            loss = -F.logsigmoid(_BETA * ((rw - rl) - (mw - ml))).mean()
        with self.clock.part("backward"):
            loss.backward()
        with self.clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def _same_lora(unet: Any) -> None:
    """The same LoRA weights on both sides, and none at zero, so that the loss says something."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(unet.named_parameters()):
            if ".student." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
