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


class Metrics:
    """Written by the main process alone.

    Args:
        accelerator: Whose trackers hear the same.
        folder: Holds `metrics.jsonl`.
    """

    def __init__(self, accelerator: Any, folder: Path) -> None:
        self._accelerator, self._folder = accelerator, folder
        self._lines: Any = None

    @contextmanager
    def open(self, step: int | None) -> Iterator[None]:
        """Keep what is there up to `step`; None begins anew."""
        if not self._accelerator.is_main_process:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        kept = []
        if path.exists() and step is not None:
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept))
        kwargs = {"tensorboard": {"purge_step": (step or 0) + 1}}
        self._accelerator.init_trackers("tensorboard", init_kwargs=kwargs)
        with path.open("a") as self._lines:
            try:
                yield
            finally:
                # `end_training` would also part the processes, which have an artifact to write yet.
                for tracker in self._accelerator.trackers:
                    tracker.finish()

    def log(self, step: int, figures: dict[str, float], look: bool = False) -> None:
        """Figures of a step; `look` marks those of the guards."""
        if self._lines is None or not figures:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        self._lines.write(json.dumps({"step": step, **({"look": True} if look else {}), **rounded}) + "\n")
        self._lines.flush()
        named = {name if "/" in name else f"train/{name}": value for name, value in figures.items()}
        self._accelerator.log(named, step)


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return 2**62
