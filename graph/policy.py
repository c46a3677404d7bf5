"""When to stop: a pure function of what has been tried.

Version 2: the target is reached, no better candidate for `patience` rounds, the rounds or the budget (new in this
version) are used up, or a round of which nothing is known. A change here changes what logged runs mean, so it
changes the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..domain import Critique, EmotionTarget, Missing, StopReason
from ..traces.fold import Fold

#: A picture that shows less than this of the neutral prompt has reached nothing, whatever one feels.
SHOWN = 0.5


def reached(critique: Critique | Missing | None, target: EmotionTarget, tolerance: float) -> bool:
    """Whether a candidate of this critique is what was wanted.

    Within `tolerance` of the target on each wanted axis, of the wanted category if there is one, and with at
    least half of the neutral prompt (`SHOWN`) in it.
    """
    if not isinstance(critique, Critique) or critique.alignment < SHOWN:
        return False
    if target.category is not None and critique.category != target.category:
        return False
    axes = zip((critique.valence, critique.arousal), target.point, strict=True)
    return all(aim is None or abs(estimate - aim) <= tolerance + 1e-9 for estimate, aim in axes)


def decide(
    fold: Fold,
    last: int,
    target: EmotionTarget,
    *,
    rounds: int,
    tolerance: float,
    patience: int,
    exhaust: bool = False,
    spent: bool = False,
) -> StopReason | None:
    """Whether to stop after a round.

    Args:
        fold: The run so far.
        last: The round that was just read, from 0.
        target: The wanted emotion.
        rounds: How many rounds there may be.
        tolerance: How near is reached, on each wanted axis.
        patience: Rounds in a row without a better candidate that end the run.
        exhaust: Use all rounds whatever was reached.
        spent: The budget allows no further round.

    Returns:
        The reason to stop, or None to go on.
    """
    if exhaust:
        if last + 1 < rounds and not spent:
            return None
        used = StopReason.ROUNDS_USED if last + 1 >= rounds else StopReason.BUDGET_USED
        return used if fold.best else StopReason.NO_CRITIQUE
    if fold.best is None or fold.mean_reward(last) is None:
        read = any(isinstance(tried.critique, Critique) for tried in fold.round(last).values())
        return StopReason.NO_REWARD if read else StopReason.NO_CRITIQUE
    if reached(fold.tried[fold.best].critique, target, tolerance):
        return StopReason.TARGET_REACHED
    if last + 1 >= rounds:
        return StopReason.ROUNDS_USED
    if spent:
        return StopReason.BUDGET_USED
    # `best` is the earliest of the best, so its round is the last that brought something better.
    if last - fold.best[0] >= patience:
        return StopReason.NO_IMPROVEMENT
    return None


def is_spent(fold: Fold, options: Mapping[str, Any]) -> bool:
    """Whether the budget allows no further round: its images would be too many, or questions or time are used up."""
    took = (fold.updated - fold.started.time).total_seconds() if fold.updated and fold.started else 0.0
    final = 2 * options.get("finalists", 0)
    used = (fold.images + options["images"] + final - 1, fold.calls, took)
    limits = (options.get(key) for key in ("max_images", "max_calls", "max_seconds"))
    return any(limit is not None and value >= limit for value, limit in zip(used, limits, strict=True))
