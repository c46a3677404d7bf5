"""Which examples a step takes, and the batch that an objective asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...tools.diffusion.conditioners import points
from ..objectives.base import Batch
from .cache import Cache


class Order:
    """An endless shuffled order over n examples: epoch after epoch, each by its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._epoch = lru_cache(2)(lambda number: np.random.default_rng([seed, 0, number]).permutation(n))

    def take(self, start: int, count: int) -> list[int]:
        """Examples at positions start … start + count of the endless order."""
        return [int(self._epoch(place // self._n)[place % self._n]) for place in range(start, start + count)]


class Loader:
    """Turns examples (`examples.Example`, `online.collect.Taken`) into the batch that an objective asks for."""

    def __init__(self, keys: frozenset[str], cache: Cache, device: torch.device) -> None:
        self._keys, self._cache, self._device = keys, cache, device

    def __call__(self, examples: Sequence[Any]) -> Batch:
        """One batch on the device; see `objectives.base` for the keys."""
        batch: dict[str, Any] = {
            key: self._column(key, examples).to(self._device) for key in sorted(self._keys - {"text"})
        }
        return batch | ({"text": [it.prompt for it in examples]} if "text" in self._keys else {})

    def _column(self, key: str, examples: Sequence[Any]) -> Any:
        if key == "added":
            return self._cache.added([(it.prompt, str(it.refined)) for it in examples])
        values = [getattr(it, "image" if key == "latents" else key) for it in examples]
        match key:
            case "prompt" | "refined":
                return self._cache.embeds(values)
            case "winner" | "loser" | "latents":
                return self._cache.latents(values)
            case "target":
                return points(values)
            case "rewards":
                # NaN where a group is smaller than the largest.
                return pad_sequence(
                    [torch.tensor(row) for row in values], batch_first=True, padding_value=math.nan
                )
            case _:
                return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
