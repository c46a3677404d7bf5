"""Checkpoints: everything that a training needs to go on as if nothing had happened.

Noise, data order and choices come from (seed, step) and need no saving. What is saved are tensors: weights in
training, optimizer, averages. A checkpoint is written beside its place, synced, and renamed, so that what
bears the name is whole; older ones go only after that.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

_FILE = "state.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`.

    Args:
        folder: Holds all checkpoints of a run.
        step: Optimizer steps done.
        state: Anything that `torch.save` takes.
        keep: How many checkpoints stay, this one included.

    Raises:
        OSError: The disk does not take it; the older ones are untouched and nothing of this one is left.
    """
    place = folder / f"step-{step:07d}"
    beside = folder / f".{place.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        with (beside / _FILE).open("wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            shutil.rmtree(place)
        os.replace(beside, place)
        _sync(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        # torch's zip writer wraps a failed write.
        raise error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where there is none."""
    for place in reversed(_all(folder)):
        try:
            return torch.load(place / _FILE, map_location="cpu", weights_only=True)
        except Exception:
            # A torn file fails in whatever way its bytes suggest.
            continue
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
