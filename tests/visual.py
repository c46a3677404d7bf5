"""A bank of random numbers for a tiny pipeline, and visual prompts that do something."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from emoloop.tools.bank.bank import THUMBNAIL, Bank, Head, plane, unit
from emoloop.tools.diffusion.families import Family
from emoloop.tools.diffusion.visual import VisualConditioner, spoken

LENGTH = 3


def bank(family: Family, length: int = LENGTH, width: int = 10) -> Bank:
    """Eight emotions of `length` entries, in the family's own text features."""
    names, points = plane(0)
    rng, entries = np.random.default_rng(0), length * len(names)
    text = rng.normal(size=(entries, spoken(family.encode("")).shape[1])).astype(np.float32)
    captions = tuple(f"entry {n}" for n in range(entries))
    head = Head(
        emotions=names, points=points, text_encoder="generator=tiny", visual_encoder="none", captions=captions,
        items=entries,
    )  # fmt: skip
    looks = rng.normal(size=(entries, width)).astype(np.float32)
    thumbnails = rng.integers(0, 256, (entries, THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
    emotion = np.repeat(np.arange(len(names)), length)
    return Bank(head, unit(text), looks, emotion, np.ones(entries, dtype=np.int64), thumbnails)


def stirred(family: Family, seed: int = 0, std: float = 0.5, **how: Any) -> VisualConditioner:
    """Visual prompts whose output projections have left zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VisualConditioner.of_bank(bank(family), family, **({"k": 2, "width": 8} | how))
        for layer in module.layers:
            torch.nn.init.normal_(layer.out.weight, std=std)
    return module.eval()
