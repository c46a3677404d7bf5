"""How far a critic can be trusted: its error, where on the plane it errs, and whether its own spread says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ...agents.schemas import CriticAnswer
from .data import Sample
from .policy import CriticPolicy
from .rewards import read_answer

AXES = ("valence", "arousal")

#: Edges of the regions on each axis.
EDGES = (-3.0, -1.8, -0.6, 0.6, 1.8, 3.0)


def figures(answers: Sequence[CriticAnswer | None], samples: Sequence[Sample]) -> dict[str, float]:
    """Flat figures of some readings.

    Returns:
        `valence_mae`, `arousal_mae`, `mae` (their sum), `valence_bias`, `arousal_bias` (reading − label),
        `category_accuracy`, `valid` (share of answers that can be read); what no label tells is left out.
    """
    found = {"valid": float(np.mean([answer is not None for answer in answers])), "n": float(len(samples))}
    for axis in AXES:
        misses = [
            getattr(answer, axis) - truth
            for answer, sample in zip(answers, samples, strict=True)
            if answer is not None and (truth := getattr(sample, axis)) is not None
        ]
        if misses:
            found |= {f"{axis}_mae": float(np.mean(np.abs(misses))), f"{axis}_bias": float(np.mean(misses))}
    maes = [found[f"{axis}_mae"] for axis in AXES if f"{axis}_mae" in found]
    if maes:
        found["mae"] = sum(maes)
    right = [
        answer.category.value == sample.category
        for answer, sample in zip(answers, samples, strict=True)
        if answer is not None and sample.category
    ]
    return {**found, "category_accuracy": float(np.mean(right))} if right else found


def read(policy: CriticPolicy, samples: Sequence[Sample]) -> list[CriticAnswer | None]:
    """The likeliest answer for each picture, None where it cannot be read."""
    return [read_answer(text) for text in policy.answers(samples)]


def regions(answers: Sequence[CriticAnswer | None], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Error by region of the plane, by label: centre, pictures, |ΔV| + |ΔA|, and reading − label on each axis."""
    rows = []
    points = [
        ((s.valence, s.arousal), (a.valence, a.arousal))
        for a, s in zip(answers, samples, strict=True)
        if a is not None and s.valence is not None and s.arousal is not None
    ]
    truth, said = (np.array([pair[side] for pair in points]).reshape(-1, 2) for side in (0, 1))
    cells = np.clip(np.searchsorted(EDGES, truth) - 1, 0, len(EDGES) - 2)
    for arousal in reversed(range(len(EDGES) - 1)):
        for valence in range(len(EDGES) - 1):
            here = (cells == (valence, arousal)).all(1)
            if here.any():
                miss = said[here] - truth[here]
                centre = [(EDGES[at] + EDGES[at + 1]) / 2 for at in (valence, arousal)]
                rows.append({
                    "valence": round(centre[0], 1), "arousal": round(centre[1], 1), "n": int(here.sum()),
                    "mae": float(np.abs(miss).sum(1).mean()), "valence_bias": float(miss[:, 0].mean()),
                    "arousal_bias": float(miss[:, 1].mean()),
                })  # fmt: skip
    return rows


def spread_against_error(
    policy: CriticPolicy, samples: Sequence[Sample], count: int, temperature: float
) -> dict[str, Any]:
    """Whether a picture on which sampled answers differ is one that is read wrongly.

    Args:
        policy: The critic.
        samples: Pictures with both labels.
        count: Answers for each.
        temperature: Of the sampling.

    Returns:
        `spread_error_rho` (Spearman's rank correlation of the sampled answers' deviation and their mean's error),
        `mean_mae` (error of the mean of the samples), and `thirds`: spread and error of the least to the most spread
        third. Empty where too little can be read.
    """
    known = [sample for sample in samples if sample.valence is not None and sample.arousal is not None]
    texts = policy.answers([sample for sample in known for _ in range(count)], temperature)
    spreads, errors = [], []
    for place, sample in enumerate(known):
        said = list(filter(None, map(read_answer, texts[place * count : (place + 1) * count])))
        if len(said) < 2:
            continue
        points = np.array([(it.valence, it.arousal) for it in said])
        spreads.append(points.std(0).sum())
        errors.append(np.abs(points.mean(0) - (sample.valence, sample.arousal)).sum())
    if len(spreads) < 6:
        return {}
    order = np.argsort(spreads)
    thirds = [
        {"spread": _mean(spreads, part), "mae": _mean(errors, part), "n": len(part)}
        for part in np.array_split(order, 3)
    ]
    rho = float(np.asarray(spearmanr(spreads, errors))[0])
    return {"spread_error_rho": rho, "mean_mae": float(np.mean(errors)), "samples": count, "thirds": thirds}


def _mean(values: Sequence[float], places: NDArray[np.intp]) -> float:
    return float(np.array(values)[places].mean())


def card(
    policy: CriticPolicy, samples: Sequence[Sample], count: int = 8, temperature: float = 1.0
) -> dict[str, Any]:
    """The calibration card: figures, regions, spread against error; as `training.json` and the model's card hold it."""
    answers = read(policy, samples)
    return {
        "figures": figures(answers, samples),
        "regions": regions(answers, samples),
        "spread": spread_against_error(policy, samples, count, temperature),
    }
