"""What the recipes share: schedule, moving average, checkpoints and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn


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
        if step < decay:
            return self.lr
        t = (step - decay) / max(1, self.steps - decay)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t)))

    def run(
        self,
        model: nn.Module,
        loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        title: str,
    ) -> Iterator[int]:
        """Train; yields the step count after every checkpoint. The model ends with its averaged weights.

        Args:
            model: Everything that learns.
            loss: Step → (loss, metrics).
            title: For the progress bar.

        Raises:
            FloatingPointError: The loss is not finite; the last checkpoint stays.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.97), fused=True)
        average = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}
        checkpoint, start, spent = self.out / "checkpoint.pt", 0, 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            average, start, spent = state["average"], state["step"], state["seconds"]
        begin = time.monotonic() - spent
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with (
            Progress(*columns, refresh_per_second=0.2) as progress,
            (self.out / "metrics.jsonl").open("a") as log,
        ):
            task = progress.add_task(title, total=self.steps, completed=start, note="")
            for step in range(start, self.steps):
                for group in optimiser.param_groups:
                    group["lr"] = self.rate(step)
                torch.manual_seed(self.seed * 1_000_003 + step)
                with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
                    value, metrics = loss(step)
                if not torch.isfinite(value):
                    raise FloatingPointError(
                        f"{title}: loss is {value.item()} at step {step}; lower --lr and resume"
                    )
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                decay = min(self.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    names = list(average)
                    now = model.state_dict()
                    torch._foreach_lerp_([average[n] for n in names], [now[n] for n in names], 1 - decay)
                self.losses.append(value.item())
                seconds = time.monotonic() - begin
                if step % 20 == 0 or step + 1 == self.steps:
                    line = {
                        "step": step,
                        "loss": round(value.item(), 5),
                        "seconds": round(seconds, 1),
                        **{k: round(v, 5) for k, v in metrics.items()},
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                progress.update(task, completed=step + 1, note=f"loss {value.item():.4f}")
                out_of_time = self.minutes is not None and seconds > 60 * self.minutes
                if (step + 1) % self.save_every == 0 or step + 1 == self.steps or out_of_time:
                    state: dict[str, Any] = {
                        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
                        "step": step + 1, "seconds": seconds,
                    }  # fmt: skip
                    torch.save(state, checkpoint.with_suffix(".tmp"))
                    checkpoint.with_suffix(".tmp").replace(checkpoint)
                    yield step + 1
                if out_of_time:
                    break
        model.load_state_dict(average, strict=False)


def save_half(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().contiguous().cpu() for k, v in tensors.items()}, folder / name)
