"""From rollouts to training examples: one streaming pass over the source, then rows on demand.

The pass keeps a few numbers per run (some 100 bytes), the reward of each image and a hash of all that it read.
Prompts and image addresses stay in the source until a batch asks for them. `examples.py` says what an example is.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from ...domain import EmotionTarget, UserError
from ..config import KINDS, DataConfig
from ..rollouts import Request, Rollout, RolloutSource, fingerprint
from .examples import SOURCES, TABLES, Example, across, best_of, group_of, pairs, preferences, usable
from .phrasebook import Phrasebook, tell
from .split import held_out, normal
from .statistics import Histogram, Statistics

Split = Literal["train", "held_out"]


class Dataset:
    """Examples of a source of rollouts.

    Attributes:
        rollouts: Where they come from.
        config: How they were made.
        base: The model that made all images.
        reward: Name and version of the reward they carry.
        phrasebook: What `DataConfig.phrases` asked for.
        statistics: What was found.
    """

    def __init__(self, rollouts: RolloutSource, config: DataConfig | None = None) -> None:
        self.rollouts, self.config = rollouts, config or DataConfig()
        self.base, self.reward = rollouts.base, rollouts.reward
        self.phrasebook: Phrasebook | None = None
        self.statistics = self._collect()

    def _collect(self) -> Statistics:
        """The one pass."""
        config, hasher = self.config, hashlib.sha256()
        ids: list[str] = []
        prompts: list[bytes] = []
        held: list[bool] = []
        different: set[bytes] = set()
        points: list[tuple[float, ...]] = []
        read: list[int] = []
        gains: list[float] = []
        rewards = array("d")
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SOURCES}
        for run, (request, every) in enumerate(self.rollouts):
            neutral = normal(request.prompt)
            ids.append(request.run_id)
            prompts.append(hashlib.sha256(request.prompt.encode()).digest())
            held.append(held_out(neutral, config.held_out, config.split_salt))
            different.add(hashlib.sha256(neutral.encode()).digest()[:12])
            points.append(tuple(math.nan if axis is None else axis for axis in request.target.point))
            hasher.update(fingerprint(request, every))
            counts["images"] += sum(it.sha256 is not None for it in every)
            counts["missing"] += sum(it.reward is None for it in every)
            some = usable(every, config)
            rewards.extend(it.reward for it in some if it.reward is not None)
            if config.phrases and any(it.critique for it in some):
                read.append(run)
            found, reason = self._index(run, request, some, rows)
            gains += found
            if reason is not None:
                dropped[reason] += 1
        self._ids, self._held = np.array(ids, dtype=np.str_), np.array(held, dtype=bool)
        wanted = np.array(points, dtype=np.float64).reshape(-1, 2)
        if "across" in config.kinds:
            rows["preferences"] += across(prompts, wanted, np.array(rows["bests"], dtype=TABLES["bests"]))
        told: dict[str, Any] = {}
        if config.phrases:
            self.phrasebook, rows["phrases"] = tell(
                self.rollouts, config, self._ids, np.array(read, dtype=np.int64), self._held, wanted
            )
            book, used = self.phrasebook, Counter(row[3] for row in rows["phrases"])
            told["phrasebook"] = {book.phrases[phrase]: count for phrase, count in used.most_common()}
            told["reader_error"] = tuple(book.reader.errors.mean(0).tolist())
        self._tables = {name: np.array(rows[name], dtype=dtype) for name, dtype in TABLES.items()}
        kinds = np.bincount(self._tables["preferences"]["kind"], minlength=len(KINDS)).tolist()
        return Statistics(
            runs=len(ids),
            prompts=len(different),
            images=counts["images"],
            rewarded=len(rewards),
            missing=counts["missing"],
            dropped=dict(sorted(dropped.items())),
            sources={
                name: {split: len(self._rows(name, split)) for split in get_args(Split)} for name in SOURCES
            },
            kinds=dict(zip(KINDS, kinds, strict=True)),
            gains=Histogram.of(np.array(gains), -1, 1.5, 25),
            mean_gain=float(np.mean(gains)) if gains else None,
            rewards=Histogram.of(np.array(rewards), -2, 2, 40),
            valence=Histogram.of(wanted[:, 0], -3, 3, 12),
            arousal=Histogram.of(wanted[:, 1], -3, 3, 12),
            data_hash=hasher.hexdigest(),
            **told,
        )

    def _index(
        self, run: int, request: Request, some: list[Rollout], rows: dict[str, list[tuple[Any, ...]]]
    ) -> tuple[list[float], str | None]:
        """Add one run's usable rollouts to the tables; the gains of its rounds, and why it gives no pair."""
        rows["wishes"].append((run,))
        if not some:
            return [], "no reward"
        best = best_of(some)
        rows["bests"].append((run, best.round, best.index))
        rows["preferences"] += [
            (run, winner.round, winner.index, run, loser.round, loser.index, KINDS.index(kind))
            for winner, loser, kind in preferences(some, self.config)
        ]
        if group_of(some, self.config):
            rows["groups"].append((run,))
        kept, gains, reason = pairs(some, self.config, lambda: self.rollouts.rescore(request.run_id))
        rows["pairs"] += [(run, *pair) for pair in kept]
        return gains, reason

    def _rows(self, source: str, split: Split) -> np.ndarray:
        return np.flatnonzero(self._held[self._tables[source]["run"]] == (split == "held_out"))

    def examples(self, source: str, split: Split = "train") -> Examples:
        """The examples of a source.

        Raises:
            UserError: There are none to train on, with what was dropped and why.
        """
        rows = self._rows(source, split)
        if split == "train" and not len(rows):
            found, held = self.statistics, self.statistics.sources[source]["held_out"]
            dropped = found.dropped.items() if source == "pairs" else ()
            why = ", ".join(f"{count} × {reason}" for reason, count in dropped)
            # A round shows each of its prompts once by default, and a group is several pictures of the neutral one.
            mend = "set data.group=all, or collect with loop.neutral_images of 2 and more; or " * (
                source == "groups"
            )
            raise UserError(
                f"the {found.runs} runs give no {source} to train on"
                + (f" ({why})" if why else "")
                + (f", and {held} held out (lower data.held_out)" if held else "")
                + f": {mend}loosen data.min_gain, data.min_margin or --from, or collect more runs"
            )
        return Examples(self, source, rows)

    def fetch(self, source: str, rows: Sequence[int] | np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Examples by row number; where one has several images to choose from, `rng` chooses.

        `rng` is used the same number of times whatever the rows hold.
        """
        picked = self._tables[source][np.asarray(rows, dtype=np.int64)]
        chances = rng.random(len(picked))
        runs = [picked[name] for name in ("run", "other") if name in (picked.dtype.names or ())]
        found = self.rollouts.fetch(self._ids[np.concatenate(runs)].tolist())
        out = []
        for number, row, chance in zip(rows, picked, chances, strict=True):
            request = found[str(self._ids[row["run"]])][0].request
            fields = {"target": request.target, **self._fields(source, row, float(chance), found)}
            out.append(Example(request.run_id, request.prompt, number=int(number), **fields))
        return out

    def _fields(
        self, source: str, row: Any, chance: float, found: dict[str, list[Rollout]]
    ) -> dict[str, Any]:
        """What fills an example besides its run, prompt and number."""
        mine = found[str(self._ids[row["run"]])]
        request, told = mine[0].request, {}
        if source in ("pairs", "phrases"):
            told["advantage"] = float(row["gain"])
            if axes := {axis: float(row[axis]) for axis in ("valence", "arousal") if row[axis] == row[axis]}:
                told["target"] = EmotionTarget.model_validate(axes)
        match source:
            case "phrases":
                assert self.phrasebook is not None
                phrase = self.phrasebook.phrases[row["phrase"]]
                return {**told, "refined": f"{request.prompt}{phrase}", "phrase": int(row["phrase"])}
            case "pairs":
                one = next(it for it in mine if (it.round, it.index) == (row["round"], row["index"]))
                inside = [it for it in mine if (it.round, it.prompt) == (one.round, one.prompt)]
                shown = inside[int(chance * len(inside))]
                return {**told, "wanted": request.target, "refined": one.prompt, "image": shown.sha256}
            case "wishes":
                return {}
            case "bests":
                return {"winner": _at(mine, row["round"], row["index"])}
            case "preferences":
                theirs = found[str(self._ids[row["other"]])]
                return {
                    "winner": _at(mine, row["round"], row["index"]),
                    "loser": _at(theirs, row["other_round"], row["other_index"]),
                    "kind": KINDS[row["kind"]],
                }
            case _:
                group = group_of(usable(mine, self.config), self.config)
                one = group[int(chance * len(group))]
                rewards = tuple(float(it.reward or 0.0) for it in group)
                return {"image": one.sha256, "reward": one.reward, "rewards": rewards}


class Examples:
    """Random access to the examples of one source and split."""

    #: Optimizer steps after which the data change; `online.collect` makes others then.
    every = 1

    def __init__(self, dataset: Dataset, source: str, rows: np.ndarray) -> None:
        self.dataset, self.source, self._rows = dataset, source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, numbers: Sequence[int], rng: np.random.Generator | None = None) -> list[Example]:
        """Examples by number, in that order."""
        return self.dataset.fetch(self.source, self._rows[list(numbers)], rng or np.random.default_rng(0))

    def begin(self, step: int) -> dict[str, float]:
        """Called before each optimizer step; figures that are logged with it."""
        return {}


def _at(rollouts: Sequence[Rollout], round_: int, index: int) -> str | None:
    return next(it.sha256 for it in rollouts if (it.round, it.index) == (round_, index))
