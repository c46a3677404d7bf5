"""Figures of a training: a line of JSON a step, and TensorBoard through accelerate's tracker.

The file is ours since accelerate has no such tracker, and since a resumed training writes its lines again: those
beyond the checkpoint go first, so that no step stands in it twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import write_atomic


class Metrics:
    """Written by the main process alone.

    Args:
        accelerator: Whose trackers hear the same.
        folder: Holds `metrics.jsonl`.
    """

    def __init__(self, accelerator: Any, folder: Path) -> None:
        self._accelerator, self._path = accelerator, folder / "metrics.jsonl"

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Keep what is there up to `step`; -1 begins anew."""
        if self._accelerator.is_main_process:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            write_atomic(self._path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        self._accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        try:
            yield
        finally:
            # `end_training` would also part the processes, which have an artifact to write yet.
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def log(self, step: int, figures: dict[str, float], look: bool = False) -> None:
        """Figures of a step; `look` marks those of the guards."""
        if not figures:
            return
        if self._accelerator.is_main_process:
            rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **({"look": True} if look else {}), **rounded}) + "\n")
        named = {name if "/" in name else f"train/{name}": value for name, value in figures.items()}
        self._accelerator.log(named, step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
