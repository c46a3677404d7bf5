"""How a run's final round begins (`traces.final` says what it is for)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..domain import StopReason
from ..events import Rewritten
from ..traces.final import NODE
from ..traces.fold import Fold

#: Ends that have something to deliver.
DELIVERS = (
    StopReason.TARGET_REACHED,
    StopReason.NO_IMPROVEMENT,
    StopReason.ROUNDS_USED,
    StopReason.BUDGET_USED,
)


def finalists(fold: Fold, options: Mapping[str, Any]) -> int:
    """How many prompts the final round has, within the run's budget of images; 0 is none."""
    wanted, most = options.get("finalists", 0), options.get("max_images")
    return wanted if most is None or fold.final is not None else min(wanted, (most - fold.images) // 2)


def final_round(fold: Fold, count: int) -> list[Rewritten]:
    """The events that begin the final round: the prompts of the best pictures, as proposals of one round more.

    Args:
        fold: The run.
        count: How many prompts at most.
    """
    if fold.final is not None:
        return list(fold.rewrites[fold.final].values())
    valued = [
        (it.reward, key, it.made) for key, it in fold.tried.items() if it.made and it.reward is not None
    ]
    ranked = sorted(valued, key=lambda it: (-it[0], it[1]))
    prompts = list(dict.fromkeys(made.prompt for *_, made in ranked))[:count]
    return [
        Rewritten(
            run_id=fold.run_id,
            round=fold.numbers[-1] + 1,
            index=index,
            node=NODE,
            prompt=prompt,
            why="among the best: painted and read again before one is delivered",
            model=NODE,
            prompt_version=NODE,
        )
        for index, prompt in enumerate(prompts)
    ]
