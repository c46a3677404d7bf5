"""What is measured, each as one small function of numbers.

Definitions follow the papers where they give one: V-Error, A-Error and the rank correlation along a sweep
from EmotiCrafter (arXiv 2501.05710), Emo-A from EmoGen (arXiv 2401.04608). A value that cannot be had is
None and never 0: a missing reading must not look like a perfect or a hopeless one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.spatial.distance import cosine
from scipy.stats import kendalltau

from ..domain import Critique, Emotion, EmotionTarget
from .records import Reading
from .suites import Request


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there; None where none is."""
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def axis_errors(reading: Reading | Critique, target: EmotionTarget) -> tuple[float | None, float | None]:
    """(|valence - wanted|, |arousal - wanted|); None on an axis that is not wanted or was not read."""

    def off(read: float | None, wanted: float | None) -> float | None:
        return None if read is None or wanted is None else abs(read - wanted)

    valence, arousal = target.point
    return off(reading.valence, valence), off(reading.arousal, arousal)


def error(reading: Reading | Critique, target: EmotionTarget) -> float | None:
    """|ΔV| + |ΔA| over the wanted axes; None where a wanted axis was not read."""
    errors = axis_errors(reading, target)
    if any(off is None for off, wanted in zip(errors, target.point, strict=True) if wanted is not None):
        return None
    return sum(off for off in errors if off is not None)


def apart(one: Reading | None, other: Reading | None) -> float | None:
    """|ΔV| + |ΔA| between two readings of one picture; None where either does not say."""
    if one is None or other is None or None in (one.valence, one.arousal, other.valence, other.arousal):
        return None
    return error(one, EmotionTarget(valence=other.valence, arousal=other.arousal))


def bias_and_spread(readings: Sequence[Reading], target: EmotionTarget) -> tuple[float | None, float | None]:
    """The two parts of the error of several pictures of one wish.

    Returns:
        Bias, the error of their mean reading: what the words or weights get wrong each time. And spread, the mean
        |ΔV| + |ΔA| between each reading and that mean: what is luck. None for fewer than two pictures.
    """
    axes = [name for name, aim in zip(("valence", "arousal"), target.point, strict=True) if aim is not None]
    read = [{axis: getattr(it, axis) for axis in axes} for it in readings]
    if len(read) < 2 or any(value is None for it in read for value in it.values()):
        return None, None
    middle = Reading.model_validate({axis: np.mean([it[axis] for it in read]) for axis in axes})
    apart = [sum(abs(it[axis] - getattr(middle, axis)) for axis in axes) for it in read]
    return error(middle, target), float(np.mean(apart))


#: A picture has reached its target where |ΔV| + |ΔA| by the judge is no more than this.
NEAR = 0.5


def error_at(images: int, led: Sequence[tuple[int, float | None]]) -> float | None:
    """The error of what would have been handed over after so many images.

    Args:
        images: How many.
        led: (images so far, error) each time that the critic's favourite changes; None where nobody read it.
    """
    so_far = [error for count, error in led if count <= images]
    return so_far[-1] if so_far else None


def images_to_target(led: Sequence[tuple[int, float | None]], budget: int) -> float | None:
    """Images until the critic's favourite lies within `NEAR` of the target, by the judge.

    An answer that never does counts the whole budget, so a mean over requests says how many images are spent on
    one (the restricted mean of survival analysis), and is no mean over the lucky ones.
    """
    if not led or any(error is None for _, error in led):
        return None
    return float(next((count for count, error in led if error is not None and error <= NEAR), budget))


def emotion_right(reading: Reading, target: EmotionTarget) -> float | None:
    """1 where the judge names the wanted category, else 0; its mean is Emo-A. None where either is absent."""
    if target.category is None or reading.category is None:
        return None
    return float(reading.category == target.category)


def rank_tau(wanted: Sequence[float], read: Sequence[float | None]) -> float | None:
    """Kendall's τ-b between target and reading along a sweep, in [-1, 1].

    A sweep whose readings are all the same follows nothing: 0, where the formula has no value.
    """
    pairs = [(w, r) for w, r in zip(wanted, read, strict=True) if r is not None]
    if len(pairs) < 3:
        return None
    tau = float(np.asarray(kendalltau(*zip(*pairs, strict=True)))[0])
    return tau if np.isfinite(tau) else 0.0


def feature_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine distance in [0, 2]; 0 between two vectors of zeros."""
    if not np.any(a) or not np.any(b):
        return 0.0 if not np.any(a) and not np.any(b) else 1.0
    return float(cosine(a, b))


def smoothness(
    features: Sequence[Sequence[float] | None],
    distance: Callable[[Sequence[float], Sequence[float]], float] = feature_distance,
) -> float | None:
    """Mean distance between neighbours of a sweep (same prompt, same seed); lower is smoother.

    0 for a picture that never changes, so it says something only beside `rank_tau`. With LPIPS as
    `distance` it is the shape of EmotiCrafter's LPIPS-Continuous.
    """
    return mean(distance(a, b) for a, b in pairwise(features) if a is not None and b is not None)


def amortisation(base: np.ndarray, student: np.ndarray, loop: np.ndarray) -> np.ndarray:
    """(error of base - error of one pass) / (error of base - error of the loop), of mean errors."""
    return (base - student) / (base - loop)


#: One line through the targets of a prompt: (axis, prompt, value of the other axis, category).
Line = tuple[str, str, float | None, Emotion | None]


def sweeps(
    requests: Sequence[Request], declared: Mapping[Line, Collection[float]] | None = None
) -> list[tuple[str, list[int]]]:
    """The sweeps of some requests: one prompt, one axis over 3 values or more, the rest equal.

    Args:
        requests: The requests.
        declared: The values of each line that counts; without it every line that is found counts.

    Returns:
        ("valence" | "arousal", places in `requests` in rising order of that axis).
    """
    found: dict[Line, dict[float, int]] = {}
    for place, request in enumerate(requests):
        target = request.target
        for axis, other in (("valence", "arousal"), ("arousal", "valence")):
            value = getattr(target, axis)
            key = (axis, request.prompt, getattr(target, other), target.category)
            if value is not None and (not declared or value in declared.get(key, ())):
                found.setdefault(key, {})[value] = place
    return [
        (key[0], [places[value] for value in sorted(places)])
        for key, places in found.items()
        if len(places) >= 3
    ]
