"""The dial of a distilled adapter put right: who asks for valence 2 gets what reads as 2, as far as it reaches.

A student whose one answer stands for many teachers gives something like their average, and an average feels less
than what it is made of: along either axis the images follow the target in order, but not all the way. After training,
images of training prompts over a grid of targets are read by the guard (never by a judge); an isotonic regression of
what was read on what was asked for, inverted, says what the emotion tokens shall hear for each wish.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from ..emotion import HIGH, LOW
from .cache import Cache
from .config import CalibrationConfig
from .guards import GuardModel
from .policy import Policy


def calibrate(
    policy: Policy, cache: Cache, reader: GuardModel, prompts: Sequence[str], config: CalibrationConfig
) -> dict[str, list[float]]:
    """Look at a policy's images over a grid of targets and put its dial right.

    Args:
        policy: After training; its tokens are changed.
        cache: Encodes the prompts.
        reader: Reads the images.
        prompts: Neutral prompts of the training split; the first `config.prompts` different ones are used.
        config: How closely to look.

    Returns:
        `asked`: the knots. For either axis `<axis>_read`: the mean reading at each, and `<axis>_heard`: what is heard
        for it from now on.
    """
    knots = np.linspace(LOW, HIGH, config.knots)
    grid = torch.tensor(list(product(knots, knots)), dtype=torch.float32)
    # Measured through a straight dial: what an earlier round said of its own adapter holds no longer.
    policy.tokens.calibrate(torch.tensor(np.stack([knots, knots])))
    readings = []
    for number, prompt in enumerate(list(dict.fromkeys(prompts))[: config.prompts]):
        told = cache.embeds([prompt]).to(policy.device)
        seeds = [1000 * number + place for place in range(len(grid))]
        for start in range(0, len(grid), config.knots):
            rows = slice(start, start + config.knots)
            target = grid[rows].to(policy.device)
            images = policy.sample(told.expand(len(target)), target, seeds[rows])
            readings += [(reading.valence, reading.arousal) for reading in reader.read(images)]
    square = np.array(readings).reshape(-1, config.knots, config.knots, 2)
    means = square[..., 0].mean((0, 2)), square[..., 1].mean((0, 1))
    heard = np.stack([inverse(knots, mean) for mean in means])
    policy.tokens.calibrate(torch.tensor(heard))
    report = {"asked": knots}
    for axis, mean, values in zip(("valence", "arousal"), means, heard, strict=True):
        report |= {f"{axis}_read": mean, f"{axis}_heard": values}
    return {name: [round(float(value), 3) for value in values] for name, values in report.items()}


def inverse(asked: NDArray[np.float64], read: NDArray[np.float64]) -> NDArray[np.float64]:
    """What to ask for so that each of `asked` is read.

    Args:
        asked: (K,) rising.
        read: (K,) what was read for each; made monotone first (isotonic regression, least squares).

    Returns:
        (K,) rising, within the ends of `asked`: beyond what was ever read there is nothing to ask for.
    """
    # Pooled neighbours are equal; a hair's slope makes them invertible.
    rising = isotonic_regression(read).x + 1e-6 * np.arange(len(read))
    return np.interp(asked, rising, asked)
