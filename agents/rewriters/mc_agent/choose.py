"""Which of several prompts are painted: near to the target as far as the run knows, and different from each other.

Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) with the expected error in place of relevance: before
anything was read it is the same for all, and the most different prompts are taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ....domain import Critique, EmotionTarget, Round
from ....tools.words import WordModel, expected_distance

#: Points of expected error that a prompt of wholly other words may cost.
_DIFFERENCE = 1.0


def choose(
    prompts: Sequence[str], count: int, neutral: str, target: EmotionTarget, rounds: Sequence[Round] = ()
) -> list[tuple[int, float | None]]:
    """The chosen prompts, best first: place, and the error that is expected of it where anything was read.

    Args:
        prompts: The candidates.
        count: How many are wanted.
        neutral: The neutral prompt: its own words tell no prompt from another.
        target: The wanted emotion.
        rounds: What was tried: the readings say what words do.
    """
    own = _words(neutral)
    said = [_words(prompt) - own for prompt in prompts]
    error = _expected(prompts, target, rounds)
    chosen: list[int] = []
    while len(chosen) < min(count, len(prompts)):
        left = [place for place in range(len(prompts)) if place not in chosen]
        chosen.append(min(left, key=lambda place: error[place] - _DIFFERENCE * _apart(said, place, chosen)))
    known = any(error)
    return [(place, error[place] if known else None) for place in chosen]


def _expected(prompts: Sequence[str], target: EmotionTarget, rounds: Sequence[Round]) -> list[float]:
    """What each prompt's reading is expected to be off, by a model of words over what this run read."""
    shown = [(it.prompt, it.critique) for round in rounds for it in round.candidates]
    read = [(prompt, it) for prompt, it in shown if isinstance(it, Critique)]
    if not read:
        return [0.0] * len(prompts)
    readings = np.array([(it.valence, it.arousal) for _, it in read])
    mean, deviation = WordModel().predict(prompts, [prompt for prompt, _ in read], readings)
    return expected_distance(mean, deviation, target).tolist()


def _apart(said: Sequence[set[str]], place: int, chosen: Sequence[int]) -> float:
    """Jaccard distance to the nearest of those that are chosen, in [0, 1]."""
    alike = (len(said[place] & said[it]) / max(1, len(said[place] | said[it])) for it in chosen)
    return 1 - max(alike, default=0.0)


def _words(prompt: str) -> set[str]:
    return set(re.findall(r"\w+", prompt.casefold()))
