"""What the recipes share: pictures, the heads that only training has, and the loop with its checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator as Rng
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from ...files import replacing
from .. import world
from ..codec import PatchAutoencoder
from ..vocabulary import COMPANIONS, FACTORS, SUBJECTS
from ..world import Scene

#: A step's loss and what to log of it.
Loss = tuple[Tensor, dict[str, float]]


@dataclass
class Recipe:
    """One training run.

    Attributes:
        out: Folder for checkpoints and, at the end, the model.
        steps: Optimiser steps.
        batch: Examples a step.
        lr: Peak learning rate; 2 % warm-up, constant, then a cosine to 5 % over the last 60 %.
        seed: Seed of everything.
        device: Torch device.
        minutes: Stop after so long even if steps are left (the rebuild check uses it).
        save_every: Steps between checkpoints.
        ema: Largest decay of the weights' moving average.
        init: Checkpoint, or saved model's folder, to start from instead of random weights.
        bf16: Run the forward pass under bfloat16 autocast (worth it where the CPU or GPU has it).
        losses: The losses of the steps of this process.
    """

    out: Path
    steps: int
    batch: int
    lr: float
    seed: int = 0
    device: str = "cpu"
    minutes: float | None = None
    save_every: int = 200
    ema: float = 0.998
    bf16: bool = False
    init: Path | None = None
    weight_decay: float = 0.01
    losses: list[float] = field(default_factory=list)

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warm, decay = max(1, self.steps // 50), int(0.4 * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        t = max(0, step - decay) / max(1, self.steps - decay)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t)))

    def run(self, model: nn.Module, loss: Callable[[int], Loss], title: str) -> None:
        """Train from the last checkpoint on; the model ends with its averaged weights.

        Args:
            model: Everything that learns.
            loss: Step → (loss, metrics).
            title: For the progress bar.

        Raises:
            FloatingPointError: The loss is not finite; the last checkpoint stays.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        learning = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.97), fused=True)
        now = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
        average = {k: v.clone() for k, v in now.items()}
        checkpoint, start, spent = self.out / "checkpoint.pt", 0, 0.0
        if checkpoint.exists():
            state: dict[str, Any] = torch.load(checkpoint, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            average, start, spent = state["average"], state["step"], state["seconds"]
        begin = time.monotonic() - spent
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
        bar = Progress(*columns, refresh_per_second=0.2)
        with bar, (self.out / "metrics.jsonl").open("a") as log:
            task = bar.add_task(title, total=self.steps, completed=start, note="")
            for step in range(start, self.steps):
                for group in optimiser.param_groups:
                    group["lr"] = self.rate(step)
                torch.manual_seed(self.seed * 1_000_003 + step)
                with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
                    tensor, metrics = loss(step)
                value = tensor.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{title}: loss is {value} at step {step}; lower --lr and resume"
                    )
                optimiser.zero_grad(set_to_none=True)
                tensor.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                decay = min(self.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_([average[k] for k in now], list(now.values()), 1 - decay)
                self.losses.append(value)
                seconds = time.monotonic() - begin
                last = step + 1 == self.steps or (self.minutes is not None and seconds > 60 * self.minutes)
                if step % 20 == 0 or step + 1 == self.steps:
                    rounded = {k: round(v, 5) for k, v in {"loss": value, **metrics}.items()}
                    log.write(json.dumps({"step": step, "seconds": round(seconds, 1), **rounded}) + "\n")
                    log.flush()
                bar.update(task, completed=step + 1, note=f"loss {value:.4f}")
                if last or (step + 1) % self.save_every == 0:
                    state = {
                        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
                        "step": step + 1, "seconds": seconds,
                    }  # fmt: skip
                    with replacing(checkpoint) as beside:
                        torch.save(state, beside)
                if last:
                    break
        model.load_state_dict(average, strict=False)


def draw(rng: Rng, count: int, folds: tuple[int, ...] | None = None) -> tuple[list[Scene], NDArray[np.uint8]]:
    """Scenes and their pictures, RGB, shape (count, 96, 96, 3)."""
    scenes = [world.sample_scene(rng, folds) for _ in range(count)]
    return scenes, np.stack([world.render(scene) for scene in scenes])


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """RGB pictures (batch, H, W, 3) → (batch, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def fitted_codec(seed: int) -> PatchAutoencoder:
    """A codec for `spoil`, fitted on 1,000 pictures."""
    codec = PatchAutoencoder()
    codec.fit(draw(np.random.default_rng([seed, 78]), 1000)[1])
    return codec


def spoil(rng: Rng, codec: PatchAutoencoder, pixels: NDArray[np.uint8]) -> Tensor:
    """Pictures as a generator would give them: through the codec, with latent noise, blur and smeared tokens.

    Args:
        rng: NumPy generator.
        codec: A fitted codec.
        pixels: RGB, shape (batch, 96, 96, 3).

    Returns:
        Shape (batch, 3, 96, 96) in [-1, 1].
    """
    x = to_tensor(pixels)
    z = codec.encode(x).latent_dist.mode()
    strength = torch.from_numpy(rng.uniform(0, 0.35, len(x)) * (rng.random(len(x)) < 0.7)).float()
    noise = torch.from_numpy(rng.standard_normal(z.shape)).float()
    spoiled = codec.decode(z + strength[:, None, None, None] * noise).sample
    for i in range(len(x)):
        if rng.random() < 0.3:
            kept = int(rng.integers(4, 12))
            masked = z[i : i + 1].clone()
            masked[:, kept:] *= float(rng.uniform(0, 0.6))
            spoiled[i] = codec.decode(masked).sample[0]
    clean = torch.from_numpy(rng.random(len(x)) < 0.15)[:, None, None, None]
    result = torch.where(clean, x, spoiled).clamp(-1, 1)
    return torch.round((result + 1) * 127.5) / 127.5 - 1


#: Number of each icon in `layout`; 0 is background.
_NUMBERS = {name: 1 + i for i, name in enumerate([*SUBJECTS, *COMPANIONS])}


def layout(scene: Scene) -> NDArray[np.int64]:
    """Which icon covers each of the 8 × 8 image tokens, row by row; 0 is background."""
    grid = np.zeros((8, 8), np.int64)
    boxes = [(*world.corner(placed), placed.name) for placed in scene.companions]
    for left, top, size, name in [*boxes, (*world.SUBJECT_BOX, scene.subject)]:
        rows, columns = (slice(start // world.TOKEN, (start + size) // world.TOKEN) for start in (top, left))
        grid[rows, columns] = _NUMBERS[name]
    return grid.reshape(-1)


class Heads(nn.Module):
    """Predicts the icon on each image token, and the factors from the tokens' mean. Exists only in training.

    Args:
        width: Size of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.things = nn.Linear(width, 1 + len(_NUMBERS))
        self.whole = nn.ModuleList(nn.Linear(width, len(values)) for values in FACTORS.values())

    def losses(
        self, hidden: Tensor, scenes: Sequence[Scene], told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the icons (background weighs .15) and of the factors.

        Args:
            hidden: Shape (batch, 64, width).
            scenes: What the pictures show.
            told: Shape (batch,), bool: the pictures that count; None counts all.
        """
        device = hidden.device
        told = torch.ones(len(scenes), dtype=torch.bool, device=device) if told is None else told
        covers = torch.from_numpy(np.stack([layout(scene) for scene in scenes])).to(device)
        weight = (torch.where(covers == 0, 0.15, 1.0) * told[:, None]).flatten()
        logits = self.things(hidden).float().flatten(0, 1)
        things = F.cross_entropy(logits, covers.flatten(), reduction="none")
        mean = hidden.mean(1)[told]
        labels = torch.tensor([world.factor_indices(scene) for scene in scenes], device=device)[told]
        whole = [F.cross_entropy(head(mean).float(), labels[:, i]) for i, head in enumerate(self.whole)]
        return (things * weight).sum() / weight.sum().clamp_min(1), torch.stack(whole).mean()
