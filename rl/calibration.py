"""The dial of a distilled adapter put right: who asks for valence 2 gets what reads as 2, as far as it reaches.

A student whose one answer stands for many teachers gives something like their average, and an average feels less
than what it is made of; and words that raise the one axis often lower the other. So after training, images of training
prompts over a grid of targets are read by the guard (never by a judge), a quadratic response surface is fitted to what
was read (Box & Wilson 1951), and for each wish on a grid the emotion tokens are told what to hear: the target whose
fitted reading is nearest to the wish.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ..emotion import HIGH, LOW
from .cache import Cache
from .config import CalibrationConfig
from .guards import GuardModel
from .policy import Policy


def calibrate(
    policy: Policy, cache: Cache, reader: GuardModel, prompts: Sequence[str], config: CalibrationConfig
) -> dict[str, Any]:
    """Look at a policy's images over a grid of targets and put its dial right.

    Args:
        policy: After training; its tokens are changed.
        cache: Encodes the prompts.
        reader: Reads the images.
        prompts: Neutral prompts of the training split; the first `config.prompts` different ones are used.
        config: How closely to look.

    Returns:
        `asked`: the knots. `valence_read` and `arousal_read`: the fitted readings before, and `valence_heard` and
        `arousal_heard`: what is heard from now on; each by wished valence, then arousal.
    """
    knots = np.linspace(LOW, HIGH, config.knots)
    grid = np.array(list(product(knots, knots)))
    targets = torch.tensor(grid, dtype=torch.float32)
    # Measured through a straight dial: what an earlier round said of its own adapter holds no longer.
    policy.tokens.calibrate(targets.T.reshape(2, config.knots, config.knots))
    readings = []
    chosen = list(dict.fromkeys(prompts))[: config.prompts]
    for number, prompt in enumerate(chosen):
        told = cache.embeds([prompt]).to(policy.device)
        seeds = [1000 * number + place for place in range(len(grid))]
        for start in range(0, len(grid), config.knots):
            rows = slice(start, start + config.knots)
            target = targets[rows].to(policy.device)
            images = policy.sample(told.expand(len(target)), target, seeds[rows])
            readings += [(reading.valence, reading.arousal) for reading in reader.read(images)]
    surface = respond(np.tile(grid, (len(chosen), 1)), np.array(readings))
    heard = inverse(surface, grid)
    policy.tokens.calibrate(torch.tensor(heard.T.reshape(2, config.knots, config.knots)))
    report: dict[str, Any] = {"asked": knots.tolist()}
    for name, values in (("read", _terms(grid) @ surface), ("heard", heard)):
        for place, axis in enumerate(("valence", "arousal")):
            square = values[:, place].reshape(config.knots, config.knots)
            report[f"{axis}_{name}"] = square.round(3).tolist()
    return report


def respond(asked: NDArray[np.float64], read: NDArray[np.float64]) -> NDArray[np.float64]:
    """The response surface: least squares of readings on 1, v, a, v², a², va.

    Args:
        asked: (N, 2) targets.
        read: (N, 2) readings.

    Returns:
        (6, 2) coefficients.
    """
    return np.linalg.lstsq(_terms(asked), read, rcond=None)[0].astype(np.float64)


def inverse(surface: NDArray[np.float64], wishes: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each wish the target whose reading comes nearest.

    Args:
        surface: (6, 2) coefficients.
        wishes: (M, 2).

    Returns:
        (M, 2) targets in [-3, 3]: beyond the ends nothing was ever measured.
    """

    def solve(wish: NDArray[np.float64]) -> NDArray[np.float64]:
        def miss(target: NDArray[np.float64]) -> NDArray[np.float64]:
            # A touch of the wish itself decides where readings leave it open.
            return np.concatenate([_terms(target[None])[0] @ surface - wish, 0.05 * (target - wish)])

        return least_squares(miss, np.clip(wish, LOW + 1e-3, HIGH - 1e-3), bounds=(LOW, HIGH)).x

    return np.array([solve(wish) for wish in wishes])


def _terms(points: NDArray[np.float64]) -> NDArray[np.float64]:
    valence, arousal = points.T
    return np.stack([np.ones_like(valence), valence, arousal, valence**2, arousal**2, valence * arousal], 1)
