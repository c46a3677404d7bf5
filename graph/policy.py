"""When to stop: a pure function of what has been tried.

Version 1: the target is reached, no better candidate for `patience` rounds, the rounds are used up, or a
round of which nothing is known. A change here changes what logged runs mean, so it changes the version.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..domain import Candidate, Critique, EmotionTarget, Round, StopReason

POLICY_VERSION = 1

#: A picture that shows less than this of the neutral prompt has reached nothing, whatever one feels.
SHOWN = 0.5


def best_of(rounds: Sequence[Round]) -> Candidate | None:
    """The candidate with the highest reward, the earliest of several; None where nothing was rewarded."""
    rewarded = [c for round in rounds for c in round.candidates if c.reward is not None]
    return max(rewarded, key=lambda c: c.reward or 0.0) if rewarded else None


def reached(candidate: Candidate, target: EmotionTarget, tolerance: float) -> bool:
    """Whether a candidate is what was wanted.

    Within `tolerance` of the target on each wanted axis, of the wanted category if there is one, and with at
    least half of the neutral prompt (`SHOWN`) in it.
    """
    critique = candidate.critique
    if not isinstance(critique, Critique) or critique.alignment < SHOWN:
        return False
    if target.category is not None and critique.category != target.category:
        return False
    axes = zip((critique.valence, critique.arousal), target.point, strict=True)
    return all(aim is None or abs(estimate - aim) <= tolerance + 1e-9 for estimate, aim in axes)


def decide(
    tried: Sequence[Round],
    target: EmotionTarget,
    *,
    rounds: int,
    tolerance: float,
    patience: int,
    exhaust: bool = False,
) -> StopReason | None:
    """Whether to stop after the last of the rounds.

    Args:
        tried: The rounds so far, at least one.
        target: The wanted emotion.
        rounds: How many rounds there may be.
        tolerance: How near is reached, on each wanted axis.
        patience: Rounds in a row without a better candidate that end the run.
        exhaust: Use all rounds whatever was reached.

    Returns:
        The reason to stop, or None to go on.
    """
    if exhaust:
        if len(tried) < rounds:
            return None
        return StopReason.ROUNDS_USED if best_of(tried) else StopReason.NO_CRITIQUE
    if best_of(tried[-1:]) is None:
        read = any(isinstance(it.critique, Critique) for it in tried[-1].candidates)
        return StopReason.NO_REWARD if read else StopReason.NO_CRITIQUE
    best = best_of(tried)
    assert best is not None
    if reached(best, target, tolerance):
        return StopReason.TARGET_REACHED
    if len(tried) >= rounds:
        return StopReason.ROUNDS_USED
    # `best` is the earliest of the best, so its round is the last that brought something better.
    if len(tried) - 1 - best.round >= patience:
        return StopReason.NO_IMPROVEMENT
    return None
