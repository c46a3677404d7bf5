"""A phrasebook: what the loop's rewrites added, few enough to learn and fit for any prompt.

For one target a log holds many answers, each behind another neutral prompt: a skull here, a bomb there. A student who
hears the target alone learns their average, which is none of them. So the log is read once more, as a whole: which
additions reach which feeling (a linear reader of prompts, fitted to what the critic read), and which few of them
between them reach every target. Each neutral prompt and target then has one answer, and every prompt learns from what
was found for the others.

Only the log is asked; no picture is made and no model is called. An addition is what a refined prompt says after
its neutral prompt. One that uses words which neutral prompts are made of (a place, a subject) would change what
others' pictures show, and stays out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...domain import Critique, EmotionTarget, UserError
from ...tools.words import WordModel, addition
from ..config import DataConfig
from ..rollouts import RolloutSource
from .examples import mean_readings, unaided, usable

#: A word is ordinary (in, the) when this share of the neutral prompts use it, and content when fewer do.
_ORDINARY = 0.15

#: The reader is fitted to so many rounds at most, and the choice made on so many prompts and targets.
_ROUNDS, _PROMPTS, _TARGETS = 4000, 64, 64

#: Phrases come from so many runs at most, and are told for so many targets in all: a large log needs fewer of each.
_RUNS, _TOLD = 20_000, 20_000

#: Runs whose rollouts are fetched at once.
_CHUNK = 500

_SEED = 0


class Tried(NamedTuple):
    """One prompt of a run's round.

    Attributes:
        neutral: The run's neutral prompt.
        prompt: The prompt.
        valence: What the critic read, in the mean over its images.
        arousal: The same.
        alignment: The same.
    """

    neutral: str
    prompt: str
    valence: float
    arousal: float
    alignment: float


@dataclass(frozen=True)
class Phrasebook:
    """A few additions and what they do.

    Attributes:
        phrases: K additions, with what joins them to a prompt.
        alignment: (K,) what the critic read where each was found.
        doubt: (K, 2) how far the reader was off where each was found (left out of the fit), in valence and arousal.
        reader: What a prompt is expected to be read as.
    """

    phrases: tuple[str, ...]
    alignment: NDArray[np.float64]
    doubt: NDArray[np.float64]
    reader: WordModel

    def expect(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(N, K, 2) readings to be expected of each phrase behind each prompt."""
        told = [f"{prompt}{phrase}" for prompt in prompts for phrase in self.phrases]
        return self.reader(told).reshape(len(prompts), len(self.phrases), 2)

    def misses(self, expected: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
        """|ΔV| + |ΔA| to be feared of each phrase behind N prompts for M targets.

        Args:
            expected: (N, K, 2), what `expect` gave for the prompts.
            targets: (M, N, 2), or (M, 1, 2) for the same targets for each; NaN is not wanted and counts nothing.

        Returns:
            (M, N, K).
        """
        off = np.abs(expected - targets[:, :, None]) + self.doubt
        return np.where(np.isnan(targets)[:, :, None], 0.0, off).sum(-1)

    def __getitem__(self, places: Sequence[int]) -> Phrasebook:
        """Some of its phrases."""
        phrases = tuple(self.phrases[place] for place in places)
        return Phrasebook(phrases, self.alignment[places], self.doubt[places], self.reader)


def every_addition(tried: Sequence[Tried]) -> Phrasebook:
    """All additions that fit other prompts, and the reader.

    Args:
        tried: All rounds of the training runs.

    Raises:
        UserError: No addition fits other prompts.
    """
    rng = np.random.default_rng(_SEED)
    if len(tried) > _ROUNDS:
        tried = [tried[place] for place in np.sort(rng.choice(len(tried), _ROUNDS, replace=False))]
    # A prompt that nobody refined forbids no addition its words: it is there to be told of them.
    neutral = list(dict.fromkeys(it.neutral for it in tried if it.prompt != it.neutral))
    used = Counter(word for prompt in neutral for word in _words(prompt))
    content = {word for word, count in used.items() if count < _ORDINARY * len(neutral)}
    found: dict[str, list[int]] = {}
    for place, it in enumerate(tried):
        added = addition(it.neutral, it.prompt)
        if added is not None and not content & _words(added):
            found.setdefault(added, []).append(place)
    if not found:
        raise UserError(
            "data.phrases: no rewrite of the log says what it adds after the neutral prompt, in words of its own: "
            "set data.phrases=0"
        )
    read = np.array([(it.valence, it.arousal) for it in tried], dtype=np.float64)
    reader = WordModel([it.prompt for it in tried], read)
    if not reader.words:
        raise UserError("data.phrases: no word stands in two prompts of the log: collect more runs")
    aligned = np.array([it.alignment for it in tried])
    alignment, doubt = ([of[places].mean(0) for places in found.values()] for of in (aligned, reader.errors))
    return Phrasebook(tuple(found), np.array(alignment), np.array(doubt), reader)


def build(tried: Sequence[Tried], targets: NDArray[np.float64], size: int) -> Phrasebook:
    """Choose the additions that between them surely come nearest to the targets, greedily.

    Args:
        tried: All rounds of the training runs.
        targets: (N, 2) wanted valence and arousal; NaN where an axis is not wanted.
        size: Additions at most.

    Raises:
        UserError: No addition fits other prompts.
    """
    every, rng = every_addition(tried), np.random.default_rng(_SEED)
    neutral = list(dict.fromkeys(it.neutral for it in tried))
    asked = [neutral[place] for place in rng.permutation(len(neutral))[:_PROMPTS]]
    wanted = targets[rng.permutation(len(targets))[:_TARGETS]]
    misses = every.misses(every.expect(asked), wanted[:, None]).reshape(-1, len(every.phrases))
    chosen: list[int] = []
    nearest = np.full(len(misses), math.inf)
    while len(chosen) < min(size, len(every.phrases)):
        left = np.minimum(misses, nearest[:, None]).mean(0)
        left[chosen] = math.inf
        chosen.append(int(left.argmin()))
        nearest = np.minimum(nearest, misses[:, chosen[-1]])
    return every[chosen]


def tell(
    rollouts: RolloutSource,
    config: DataConfig,
    ids: NDArray[np.str_],
    read: NDArray[np.int64],
    held: NDArray[np.bool_],
    wanted: NDArray[np.float64],
) -> tuple[Phrasebook, list[tuple[int, float, float, int, float]]]:
    """The examples of a phrasebook: first each run's own target, then others' in an order of chance.

    Args:
        rollouts: The source.
        config: `phrases`, `phrase_targets` and `min_gain` count here.
        ids: (R,) names of all runs.
        read: Runs with readings.
        held: (R,) whether a run is held out: those choose no phrases.
        wanted: (R, 2) wanted valence and arousal, NaN where an axis is not wanted.

    Returns:
        The phrasebook, and (run, valence, arousal, phrase, expected gain) of each example.

    Raises:
        UserError: No run has the readings that it takes.
    """
    rng = np.random.default_rng(_SEED)
    if len(read) > _RUNS:
        read = np.sort(rng.choice(read, _RUNS, replace=False))
    tried: list[Tried] = []
    base: dict[int, tuple[str, Critique]] = {}
    for start in range(0, len(read), _CHUNK):
        some = read[start : start + _CHUNK].tolist()
        found = rollouts.fetch(ids[some].tolist())
        for run in some:
            mine = usable(found[str(ids[run])], config)
            neutral, first = mine[0].request.prompt, unaided(mine)
            for one, *means in mean_readings(mine):
                if one in first:
                    base[run] = neutral, _read_as(means)
                if not held[run]:
                    tried.append(Tried(neutral, str(one.prompt), *means))
    if not tried or not base:
        lacking = "no run outside the held-out prompts" if base else "no run's round 0"
        raise UserError(
            f"data.phrases: {lacking} has readings: loosen --from or data.max_spread, or collect more"
        )
    book = build(tried, wanted[~held], config.phrases)
    asked = np.array(sorted(base), dtype=np.int64)
    neutral, which = np.unique([base[run][0] for run in asked.tolist()], return_inverse=True)
    expected = book.expect(neutral.tolist())[which]
    reward, out = rollouts.rescore(str(ids[asked[0]])), []
    # As many rounds of all runs as are told in all; the last may be cut short.
    for slot, start in enumerate(range(0, min(_TOLD, config.phrase_targets * len(asked)), len(asked))):
        targets = wanted[asked if slot == 0 else rng.integers(len(wanted), size=len(asked))]
        best = book.misses(expected, targets[None])[0].argmin(1)
        rows = zip(asked.tolist(), targets.tolist(), best.tolist(), strict=True)
        for row, (run, point, phrase) in enumerate(islice(rows, _TOLD - start)):
            valence, arousal = (None if math.isnan(axis) else axis for axis in point)
            if valence is None and arousal is None:
                continue
            target = EmotionTarget(valence=valence, arousal=arousal)
            hit = _read_as([*expected[row, phrase].tolist(), float(book.alignment[phrase])])
            gain = reward(hit, target) - reward(base[run][1], target)
            if gain > config.min_gain:
                out.append((run, *point, phrase, gain))
    return book, out


def _read_as(means: Sequence[float]) -> Critique:
    valence, arousal, alignment = means
    return Critique(valence=valence, arousal=arousal, category=None, alignment=alignment)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
