"""Checkpoints: everything that a training needs to go on as if nothing had happened.

Noise, data order and choices come from (seed, step) and need no saving. What is saved are tensors: weights in
training, optimizer, averages. A file that bears its name is whole; older ones go only after it has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..domain import UserError, first_line
from ..files import check_writable, replacing

_FILE = "state.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write `state` as the checkpoint of `step`.

    Args:
        folder: Holds all checkpoints of a run.
        step: Optimizer steps done.
        state: Anything that `torch.save` takes.
        keep: How many checkpoints stay, this one included.

    Raises:
        OSError: The disk does not take it; the older ones are untouched and nothing of this one is left.
    """
    place = folder / f"step-{step:07d}" / _FILE
    try:
        with replacing(place) as beside, beside.open("wb") as file:
            torch.save({"step": step, **state}, file)
    except (OSError, RuntimeError) as error:
        if not place.exists():
            shutil.rmtree(place.parent, ignore_errors=True)
        # torch's zip writer wraps a failed write.
        raise error if isinstance(error, OSError) else OSError(first_line(error)) from error
    for old in found(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where there is none."""
    for place in reversed(found(folder)):
        try:
            return torch.load(place / _FILE, map_location="cpu", weights_only=True)
        except Exception:
            # A torn file fails in whatever way its bytes suggest.
            continue
    return None


def found(folder: Path) -> list[Path]:
    """The folders of the checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def check_folder(
    out: Path, config: Path, resume: bool, changes: Callable[[dict[str, Any]], Mapping[str, tuple[Any, Any]]]
) -> None:
    """Refuse a folder that cannot be trained into: taken, not writable, or with a training of other settings.

    Args:
        out: The folder.
        config: The file in it that a training's settings are kept in.
        resume: Whether a training is to go on.
        changes: Gives the knobs that differ from the settings of that file, as (then, now).

    Raises:
        UserError: It cannot.
    """
    check_writable(out, "--out")
    if config.exists():
        if not resume:
            raise UserError(f"--out {out} holds a training: go on with --resume, or choose another folder")
        then = yaml.safe_load(config.read_text(encoding="utf-8"))
        for key, (before, now) in changes(then).items():
            raise UserError(
                f"--resume with another {key} ({before} then, {now} now): the run could not be the same; "
                "use the old value or another --out"
            )
    elif out.is_dir() and any(out.iterdir()) and not resume:
        raise UserError(f"--out {out} is not empty: choose another folder")
