"""The final round of a run: which of its finalists is best, and what says so without having chosen it.

Of many noisy readings the highest is in part the luckiest: to choose by a critic's reading prefers pictures that the
critic misread in their favour, and the reading that won promises too much (the winner's curse). So the best prompts are
painted twice more. The first picture helps to choose among them; the second chooses nothing, and so its reading is what
may be promised.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .fold import Fold, Tried

#: The node that writes the prompts of a final round.
NODE = "final"


def choose(fold: Fold, number: int) -> tuple[int, int] | None:
    """The best candidate after a final round: the better of the two pictures that are rewarded most in the mean.

    Args:
        fold: The run.
        number: The final round.
    """
    best: tuple[float, tuple[int, int]] | None = None
    for index, rewrite in sorted(fold.rewrites[number].items()):
        mine = ((key, it) for key, it in fold.tried.items() if it.made and it.made.prompt == rewrite.prompt)
        rewards = {key: it.reward for key, it in mine if it.reward is not None}
        before = [key for key in sorted(rewards) if key[0] != number]
        pair = [max(before, key=lambda key: rewards[key])] if before else []
        pair += [(number, index)] if (number, index) in rewards else []
        if pair and (best is None or fmean(rewards[key] for key in pair) > best[0]):
            best = fmean(rewards[key] for key in pair), max(pair, key=lambda key: rewards[key])
    return best[1] if best else fold.best


def unselected(fold: Fold) -> Tried | None:
    """The picture of the best's prompt that chose nothing; None where there is none."""
    best = fold.tried[fold.best].made if fold.best else None
    if fold.final is None or best is None:
        return None
    row = fold.rewrites[fold.final]
    place = next((index for index, it in row.items() if it.prompt == best.prompt), None)
    return None if place is None else fold.round(fold.final).get(len(row) + place)
