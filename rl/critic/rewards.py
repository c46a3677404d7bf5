"""What an answer is worth: one number per task, each with its name and weight; what cannot be said is None.

A missing reward is not 0. A picture without a label says nothing about any answer, an answer that cannot be read says
nothing about its numbers (`format` says that it cannot be read). TRL sums what is there and so counts the rest as 0;
`neutral` puts the group's mean in its place, which moves no advantage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import torch
from pydantic import ValidationError
from torch import Tensor

from ...agents.schemas import CriticAnswer
from ...domain import HIGH, LOW
from ...tools.registry import resolve
from .data import Sample

#: (answer as it reads, or None where it does not; the picture's labels) → reward, or None.
TaskReward = Callable[[CriticAnswer | None, Sample], float | None]


def read_answer(text: str) -> CriticAnswer | None:
    """A critique, if the text is one JSON object with all fields in their ranges."""
    try:
        return CriticAnswer.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        return None


def format_(answer: CriticAnswer | None, sample: Sample) -> float:
    """1 where the answer can be read, else 0."""
    return float(answer is not None)


def near(axis: str) -> TaskReward:
    """1 − |Δ| / 6: dense, so that any two different answers of a group differ in reward."""

    def reward(answer: CriticAnswer | None, sample: Sample) -> float | None:
        truth = getattr(sample, axis)
        return (
            None if answer is None or truth is None else 1 - abs(getattr(answer, axis) - truth) / (HIGH - LOW)
        )

    return reward


def within(axis: str, threshold: float) -> TaskReward:
    """1 where |Δ| < threshold, else 0: the form that the paper's symbol ε suggests (and Q-Insight's code has)."""

    def reward(answer: CriticAnswer | None, sample: Sample) -> float | None:
        truth = getattr(sample, axis)
        return (
            None if answer is None or truth is None else float(abs(getattr(answer, axis) - truth) < threshold)
        )

    return reward


def category(answer: CriticAnswer | None, sample: Sample) -> float | None:
    """1 for the right one of the eight, else 0."""
    return (
        None if answer is None or sample.category is None else float(answer.category.value == sample.category)
    )


_WORD = re.compile(r"\w+")


def description(answer: CriticAnswer | None, sample: Sample) -> float | None:
    """F1 of the analysis's distinct words against the label's: naming everything costs as much as naming nothing."""
    told = sample.texts.get("analysis")
    if answer is None or not told:
        return None
    said, true = (set(_WORD.findall(text.lower())) for text in (answer.analysis, told))
    shared = len(said & true)
    return 2 * shared / (len(said) + len(true)) if said or true else None


def tasks(weights: dict[str, float], threshold: float) -> list[tuple[str, float, TaskReward]]:
    """(name, weight, reward) of the configured tasks.

    Args:
        weights: Name (or dotted path of a `TaskReward`) → weight.
        threshold: Of the `_within` rewards, in points.

    Raises:
        UserError: Unknown name.
    """
    known: dict[str, TaskReward] = {
        "format": format_,
        "valence": near("valence"),
        "arousal": near("arousal"),
        "valence_within": within("valence", threshold),
        "arousal_within": within("arousal", threshold),
        "category": category,
        "description": description,
    }
    return [(name, weight, resolve(name, known, "reward")) for name, weight in weights.items()]


def neutral(rewards: Tensor, group: int) -> Tensor:
    """Rewards in which what is missing moves no advantage.

    A missing entry becomes the mean of its task over its group; of a task that a whole group lacks, the task's mean
    over all, or 0. A row without any reward stays missing, and TRL gives it no advantage.

    Args:
        rewards: (groups × group, tasks), NaN where missing.
        group: Answers to one question.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    mean = grouped.nanmean(1, keepdim=True)
    mean = torch.where(mean.isnan(), rewards.nanmean(0), mean).nan_to_num(0.0)
    filled = torch.where(grouped.isnan(), mean, grouped).view_as(rewards)
    return torch.where(rewards.isnan().all(1, keepdim=True), rewards, filled)
