"""What each objective can learn from: the kinds of examples, and how a run's rollouts become them.

    pairs        neutral prompt, refined prompt, gain of the refinement
    phrases      the same, with an addition that was found for other prompts (`phrasebook.py`), where asked for
    wishes       a run's neutral prompt and target, whatever became of them
    bests        the best image of a run, under the neutral prompt
    preferences  two images under one neutral prompt and target, the better one first
    groups       one image with the rewards of its whole group

The gain of a rewritten prompt is measured on images that selected nothing: the neutral prompt's in round 0 against
those of the prompt in a round, and of the winning prompt without the best image, since it won by that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ...domain import EmotionTarget, UserError
from ...tools.reward import Reward
from ..config import KINDS, DataConfig, Kind
from ..rollouts import Rollout

#: What each source can give, narrowest first: an objective takes the first that has its keys.
SOURCES: dict[str, frozenset[str]] = {
    "phrases": frozenset({"number", "text", "prompt", "target", "refined", "advantage", "phrase"}),
    "wishes": frozenset({"number", "text", "prompt", "target"}),
    "pairs": frozenset({"number", "text", "prompt", "target", "refined", "advantage", "latents"}),
    "bests": frozenset({"number", "text", "prompt", "target", "winner"}),
    "preferences": frozenset({"number", "text", "prompt", "target", "winner", "loser"}),
    "groups": frozenset({"number", "text", "prompt", "target", "latents", "reward", "rewards"}),
}

#: A row of each source's table: numbers only, so that a large log fits; the rest is fetched for a batch.
TABLES: dict[str, np.dtype[Any]] = {
    "phrases": np.dtype([("run", "u4"), ("valence", "f4"), ("arousal", "f4"), ("phrase", "u4"), ("gain", "f4")]),
    "wishes": np.dtype([("run", "u4")]),
    "pairs": np.dtype([
        ("run", "u4"), ("round", "u2"), ("index", "u2"), ("gain", "f4"), ("valence", "f4"), ("arousal", "f4"),
    ]),
    "bests": np.dtype([("run", "u4"), ("round", "u2"), ("index", "u2")]),
    "preferences": np.dtype([
        ("run", "u4"), ("round", "u2"), ("index", "u2"),
        ("other", "u4"), ("other_round", "u2"), ("other_index", "u2"), ("kind", "u1"),
    ]),
    "groups": np.dtype([("run", "u4")]),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One example; which fields are filled depends on its source.

    Attributes:
        run_id: The run it comes from.
        prompt: The neutral prompt.
        target: The emotion that the student is told.
        wanted: What the run was after, where that is something else (`DataConfig.told`).
        number: Its row in the source, the same for as long as the data are.
        refined: A rewritten prompt of the run, or the neutral one with a phrase behind it.
        advantage: Its gain.
        phrase: Index in the phrasebook of what the refined prompt adds.
        winner: Address of the preferred image.
        loser: Address of the other.
        image: Address of the group's image, or of one of the winning round's.
        reward: The image's reward.
        rewards: Its group's rewards.
        kind: Which kind of preference.
    """

    run_id: str
    prompt: str
    target: EmotionTarget
    wanted: EmotionTarget | None = None
    number: int = 0
    refined: str | None = None
    advantage: float | None = None
    phrase: int | None = None
    winner: str | None = None
    loser: str | None = None
    image: str | None = None
    reward: float | None = None
    rewards: tuple[float, ...] = ()
    kind: Kind | None = None


def source_for(keys: frozenset[str], config: DataConfig | None = None) -> str:
    """The narrowest source that gives all these batch keys; `phrases` where the configuration asks for them.

    Raises:
        UserError: None does; names what is missing from the nearest one, or from the log at all.
    """
    if unknown := keys - frozenset().union(*SOURCES.values()):
        raise UserError(
            f"the log holds no {', '.join(sorted(unknown))}: what a coupled objective needs exists only where the "
            "sampler logged it while generating"
        )
    phrased = config is not None and config.phrases > 0
    wanted = [name for name in SOURCES if name != ("pairs" if phrased else "phrases")]
    for name in wanted:
        if keys <= SOURCES[name]:
            return name
    nearest = min(wanted, key=lambda name: len(keys - SOURCES[name]))
    lack = f"{nearest} lack {', '.join(sorted(keys - SOURCES[nearest]))}"
    hint = " (set data.phrases=0, or objective.on_policy=1 for opd)" if nearest == "phrases" else ""
    raise UserError(f"no source of the log gives all of {', '.join(sorted(keys))}: {lack}{hint}")


def usable(rollouts: Sequence[Rollout], config: DataConfig) -> list[Rollout]:
    """Those with an image and a reward, on which critics agree well enough."""
    limit = math.inf if config.max_spread is None else config.max_spread
    return [
        it for it in rollouts if it.reward is not None and it.sha256 is not None and (it.spread or 0) <= limit
    ]


def best_of(rollouts: Sequence[Rollout]) -> Rollout:
    """The one of the highest reward; the earliest of equals, as the log's own tables have it."""
    return max(rollouts, key=lambda it: (_value(it), -it.round, -it.index))


def pairs(
    rollouts: Sequence[Rollout], config: DataConfig, rescore: Callable[[], Reward]
) -> tuple[list[tuple[int, int, float, float, float]], list[float], str | None]:
    """Refined prompts that gained.

    Args:
        rollouts: One run's usable ones, at least one.
        config: Which of them count.
        rescore: Gives the reward, where it has to be computed for other targets.

    Returns:
        (round, index of one of its images, gain, told valence, told arousal) of each that teaches, NaN for the run's
        own target; the gains of all; and why there is no pair.
    """
    best, first = best_of(rollouts), unaided(rollouts)
    if not first:
        return [], [], "no reward in round 0"
    if config.refined == "winner" and best in first:
        return [], [], "round 0 won"
    rewritten = [every for every in by_prompt(rollouts) if every[0] not in first]
    found: list[tuple[int, int, float, float, float]] = []
    for every in rewritten:
        images = [it for it in every if config.gate == "all" or it is not best]
        if not images or (config.refined == "winner" and best not in every):
            continue
        hit = _mean_reading(every) if config.told == "read" else None
        gained, alone = (_values(some, hit, rescore) for some in (images, first))
        valence, arousal = (
            math.nan if axis is None else axis for axis in (hit.point if hit else (None, None))
        )
        gain = float(np.mean(gained) - np.mean(alone))
        found.append((every[0].round, every[0].index, gain, valence, arousal))
    gains = [gain for _, _, gain, *_ in found]
    if not found:
        why = "one image a prompt: none is left to measure the gain with" if rewritten else "no rewrite"
        return [], [], why
    kept = [row for row in found if row[2] > config.min_gain]
    if config.refined == "best" and kept:
        kept = [max(kept, key=lambda row: row[2])]
    return kept, gains, None if kept else "gain too small"


def preferences(rollouts: Sequence[Rollout], config: DataConfig) -> Iterator[tuple[Rollout, Rollout, Kind]]:
    """(winner, loser, kind) of one run's usable rollouts."""
    rated = [(it.rating, it) for it in rollouts if it.rating is not None]
    if "human" in config.kinds and len(rated) > 1:
        high, low = max(rated, key=lambda it: it[0]), min(rated, key=lambda it: it[0])
        if high[0] != low[0]:
            yield high[1], low[1], "human"
            return
    first = unaided(rollouts)
    if not first:
        return
    best, worst, top = best_of(rollouts), min(first, key=_value), max(first, key=_value)
    if "rounds" in config.kinds and best not in first and _value(best) - _value(worst) >= config.min_margin:
        yield best, worst, "rounds"
    if "within" in config.kinds and _value(top) - _value(worst) >= max(config.min_margin, 1e-9):
        yield top, worst, "within"


def across(prompts: Sequence[bytes], points: np.ndarray, bests: np.ndarray) -> list[tuple[int, ...]]:
    """Best images of two runs with one prompt: each is right for its own target, wrong for the other.

    Args:
        prompts: SHA-256 of each run's neutral prompt.
        points: (runs, 2) wanted valence and arousal, NaN where an axis is not wanted.
        bests: The table of that name.

    Returns:
        Rows of the table of preferences.
    """
    groups: dict[bytes, list[Any]] = {}
    for row in bests:
        groups.setdefault(prompts[row["run"]], []).append(row)
    out = []
    for _, members in sorted(groups.items()):
        for one, other in zip(members, members[1:] + members[:1], strict=True):
            apart = np.abs(points[one["run"]] - points[other["run"]])
            if one["run"] != other["run"] and np.nanmax(apart, initial=0.0) >= 1.0:
                out.append((*one.tolist(), *other.tolist(), KINDS.index("across")))
    return out


def group_of(rollouts: Sequence[Rollout], config: DataConfig) -> list[Rollout]:
    """The usable rollouts that form the run's group; empty where they are too few or all alike."""
    group = list(rollouts) if config.group == "all" else unaided(rollouts)
    values = {it.reward for it in group}
    return group if len(group) >= config.min_group and len(values) > 1 else []


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Those of each prompt in each round, in order."""
    groups: dict[tuple[int, str | None], list[Rollout]] = {}
    for it in rollouts:
        groups.setdefault((it.round, it.prompt), []).append(it)
    return list(groups.values())


def unaided(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Round 0's of the neutral prompt, or of the one prompt that a run began with in its place."""
    first = [it for it in rollouts if it.round == 0]
    neutral = [it for it in first if it.prompt == it.request.prompt]
    return neutral if neutral or len({it.prompt for it in first}) > 1 else first


def mean_readings(rollouts: Sequence[Rollout]) -> Iterator[tuple[Rollout, float, float, float]]:
    """(first image, valence, arousal, alignment) of each prompt in each round, in the mean over its images."""
    for group in by_prompt(rollouts):
        read = [it.critique for it in group if it.critique is not None]
        if read:
            axes = ("valence", "arousal", "alignment")
            valence, arousal, alignment = (fmean(getattr(it, axis) for it in read) for axis in axes)
            yield group[0], valence, arousal, alignment


def _value(it: Rollout) -> float:
    return it.reward or 0.0


def _values(
    rollouts: Sequence[Rollout], hit: EmotionTarget | None, rescore: Callable[[], Reward]
) -> list[float]:
    """Rewards for the run's own target, or computed again for another one."""
    if hit is None:
        return [_value(it) for it in rollouts]
    reads = [it._replace(category=None).critique for it in rollouts]
    return [rescore()(read, hit) for read in reads if read is not None]


def _mean_reading(rollouts: Sequence[Rollout]) -> EmotionTarget:
    """The mean reading of a round, on the axes that were wanted."""
    wanted = rollouts[0].request.target.point
    means = {
        axis: float(np.mean([value for it in rollouts if (value := getattr(it, axis)) is not None]))
        for axis, aim in zip(("valence", "arousal"), wanted, strict=True)
        if aim is not None
    }
    return EmotionTarget.model_validate(means)
