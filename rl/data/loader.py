"""Which examples a step takes, and the batch that an objective asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tools.diffusion.conditioners import points
from ..objectives.base import Batch
from .cache import Cache
from .examples import Example


class Order:
    """An endless shuffled order over n examples: epoch after epoch, each by its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, start: int, count: int) -> list[int]:
        """Examples at positions start … start + count of the endless order."""
        return [int(self._epoch(place // self._n)[place % self._n]) for place in range(start, start + count)]

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = np.random.default_rng([self._seed, 0, number]).permutation(self._n)
        return self._epochs[number]


class Loader:
    """Turns examples into the batch that an objective asks for."""

    def __init__(self, keys: frozenset[str], cache: Cache, device: torch.device) -> None:
        self._keys, self._cache, self._device = keys, cache, device

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One batch on the device; see `objectives.base` for the keys."""
        makers: dict[str, Callable[[], Any]] = {
            "prompt": lambda: self._cache.embeds([it.prompt for it in examples]),
            "refined": lambda: self._cache.embeds([it.refined for it in examples]),
            "added": lambda: self._cache.added([(it.prompt, str(it.refined)) for it in examples]),
            "target": lambda: points([it.target for it in examples]),
            "advantage": lambda: torch.tensor([it.advantage for it in examples]),
            "phrase": lambda: torch.tensor([it.phrase for it in examples]),
            "winner": lambda: self._cache.latents([str(it.winner) for it in examples]),
            "loser": lambda: self._cache.latents([str(it.loser) for it in examples]),
            "latents": lambda: self._cache.latents([str(it.image) for it in examples]),
            "reward": lambda: torch.tensor([it.reward for it in examples]),
            "rewards": lambda: _padded([it.rewards for it in examples]),
            "number": lambda: torch.tensor([it.number for it in examples]),
        }
        return {key: makers[key]().to(self._device) for key in sorted(self._keys)}


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows])
