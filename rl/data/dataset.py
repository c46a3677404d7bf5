"""From the log to training examples: one streaming pass over the derived tables, then rows on demand.

The pass keeps a few numbers per run (some 100 bytes), the reward of each image and a hash of all that it read.
Prompts and image addresses stay in the database until a batch asks for them.
These sources come out of it:

    pairs        neutral prompt, refined prompt, gain of the refinement
    phrases      the same, with an addition that was found for other prompts (`rl/phrasebook.py`), where asked for
    bests        the best image of a run, under the neutral prompt
    preferences  two images under one neutral prompt and target, the better one first
    groups       one image with the rewards of its whole group

The gain is measured on images that selected nothing: round 0's against a rewritten round's, and of the winning
round without the best image, since it won by that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, func, select

from ...domain import Critique, Emotion, EmotionTarget, RunStatus, UserError
from ...tools.reward import Reward, load_reward, value_now
from ...traces.rows import RunFilter
from ...traces.schema import candidates, events, runs
from .phrasebook import Phrasebook, Tried, build

if TYPE_CHECKING:
    from ...traces.store import TraceStore

Split = Literal["train", "held_out"]
Kind = Literal["rounds", "within", "across", "human"]
_KINDS: tuple[Kind, ...] = ("rounds", "within", "across", "human")

#: Runs whose prompts are read at once.
_CHUNK = 500

#: Phrases come from so many runs at most, and are told for so many targets in all: a large log needs fewer of each.
_PHRASED, _PHRASE_TARGETS = 20_000, 20_000

_PHRASE = np.dtype([("run", "u4"), ("valence", "f4"), ("arousal", "f4"), ("phrase", "u4"), ("gain", "f4")])

#: What each source can give, narrowest first: an objective takes the first that has its keys.
SOURCES: dict[str, frozenset[str]] = {
    "phrases": frozenset({"number", "prompt", "target", "refined", "advantage", "phrase"}),
    "pairs": frozenset({"number", "prompt", "target", "refined", "advantage", "latents"}),
    "bests": frozenset({"number", "prompt", "target", "winner"}),
    "preferences": frozenset({"number", "prompt", "target", "winner", "loser"}),
    "groups": frozenset({"number", "prompt", "target", "latents", "reward", "rewards"}),
}


class DataConfig(BaseModel):
    """Which runs and how they become examples.

    Attributes:
        refined: Which rewritten prompts teach: "all" that gained, "best" the one of each run that gained most,
            "winner" that of the winning round (none where a lucky image of round 0 won).
        told: The target of a pair: "wanted" is the run's, "read" what the critic read in the rewritten round, in the
            mean (hindsight, Andrychowicz et al. 2017, arXiv 1707.01495): a prompt that missed its target teaches
            exactly what it hit, so that the student need not average over misses. The gain is then counted
            towards that target.
        phrases: Above 0, `pairs` make way for `phrases`: so many additions, chosen to reach every target between
            them, that are told behind every neutral prompt (`rl/phrasebook.py`). One neutral prompt and target then
            has one answer; a student that is shown many learns their average. New emotion tokens get as many vectors
            to choose among; those of a previous adapter keep theirs.
        phrase_targets: Targets that each neutral prompt is told with them: its own, and others of the log; 20,000 in
            all and at most.
        min_gain: Pairs need more gain than this.
        max_spread: Leave out candidates on which critics (or one critic's samples) differ by more points of
            valence or arousal; None keeps all.
        gate: "unselected" measures the gain without the image that won, "all" with it (biased upwards).
        min_margin: Preference pairs need at least this difference of reward.
        kinds: Which preference pairs: "rounds" (the best image against round 0's worst), "within" (best
            against worst of round 0), "across" (two runs of one prompt with different targets), "human"
            (rated by a person; takes the place of a run's other pairs).
        group: Rounds that form a group: "first" is on-policy for what made the traces, "all" is not.
        min_group: Groups need this many rewards.
        held_out: Share of neutral prompts kept from training for guards and held-out loss.
        split_salt: Another salt gives another split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refined: Literal["all", "best", "winner"] = "all"
    told: Literal["wanted", "read"] = "wanted"
    phrases: int = Field(default=0, ge=0)
    phrase_targets: int = Field(default=32, ge=1)
    min_gain: float = 0.0
    max_spread: float | None = Field(default=None, gt=0)
    gate: Literal["unselected", "all"] = "unselected"
    min_margin: float = Field(default=0.1, ge=0)
    kinds: tuple[Kind, ...] = _KINDS
    group: Literal["first", "all"] = "first"
    min_group: int = Field(default=2, ge=2)
    held_out: float = Field(default=0.15, ge=0, lt=1)
    split_salt: str = "emoloop"


@dataclass(frozen=True)
class Example:
    """One example; which fields are filled depends on its source.

    Attributes:
        run_id: The run it comes from.
        prompt: The neutral prompt.
        target: The emotion that the student is told.
        wanted: What the run was after, where that is something else (`DataConfig.told`).
        number: Its place in the source, the same for as long as the data are.
        refined: A rewritten prompt of the run, or the neutral one with a phrase behind it.
        advantage: Its gain.
        phrase: Place in the phrasebook of what the refined prompt adds.
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


class Base(NamedTuple):
    """What made the images of a log."""

    model: str
    revision: str | None
    adapter: str | None


class Histogram(BaseModel):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray, low: float, high: float, bins: int) -> Histogram:
        """Values beyond the ends count in the outermost bins."""
        counts, edges = np.histogram(np.clip(values, low, high), bins, (low, high))
        return cls(edges=[round(float(edge), 4) for edge in edges], counts=[int(count) for count in counts])


class Statistics(BaseModel):
    """What the log holds; `emoloop distill --dry-run` prints it.

    Attributes:
        runs: Runs that the filter picked.
        prompts: Different neutral prompts.
        images: Candidates with an image.
        rewarded: Candidates with a reward.
        missing: Candidates without one.
        dropped: Runs that give no pair, by reason.
        sources: Examples by source and split.
        kinds: Preference pairs by kind.
        gains: Gains of all rewritten rounds, also below `min_gain`.
        mean_gain: Their mean.
        rewards: Rewards of all candidates.
        valence: Wanted valences.
        arousal: Wanted arousals.
        data_hash: SHA-256 over everything above the pixels that training can see.
        phrasebook: The phrases that teach, if any, with how many examples use each.
        reader_error: Mean absolute error of what the phrasebook expects (valence, arousal), leave-one-out.
    """

    runs: int
    prompts: int
    images: int
    rewarded: int
    missing: int
    dropped: dict[str, int]
    sources: dict[str, dict[str, int]]
    kinds: dict[str, int]
    gains: Histogram
    mean_gain: float | None
    rewards: Histogram
    valence: Histogram
    arousal: Histogram
    data_hash: str
    phrasebook: dict[str, int] = {}
    reader_error: tuple[float, float] | None = None


class _Place(NamedTuple):
    """A candidate within its run."""

    round: int
    index: int


@dataclass
class _Index:
    """Growing columns that end as compact arrays."""

    #: Run, round, gain, and the valence and arousal that are told in place of the wanted ones.
    pairs: list[tuple[int, int, float, float, float]] = field(default_factory=list)
    bests: list[tuple[int, int, int]] = field(default_factory=list)  # run, round, index
    preferences: list[tuple[int, int, int, int, int, int, int]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # run
    #: Run, round, and the means of what was read there; gathered for a phrasebook alone.
    rounds: list[tuple[int, int, float, float, float]] = field(default_factory=list)


class _Row(NamedTuple):
    """A candidate, as far as examples need it."""

    round: int
    index: int
    sha256: str | None
    reward: float | None
    valence: float | None
    arousal: float | None
    alignment: float | None
    spread: float | None


class _Said(NamedTuple):
    """What people said of an image."""

    valence: float | None = None
    arousal: float | None = None
    rating: float | None = None


_ROW = tuple(candidates.c[name] for name in _Row._fields)


class Dataset:
    """Examples of a log.

    Attributes:
        config: How they were made.
        statistics: What was found.
        base: The model that made all images.
        reward: Name and version of the reward they carry.

    Raises:
        UserError: An empty log, no run that the filter picks, no reward at all (critiques missing only), runs
            of several base models or several rewards.
    """

    def __init__(
        self, store: TraceStore, config: DataConfig | None = None, where: RunFilter | None = None
    ) -> None:
        self.config = config or DataConfig()
        self._store, self._chosen = store, _chosen(where)
        self.base, self.reward = origin(store, where)
        self._human = _human_feedback(store, self._chosen)
        self._again: Reward | None = None
        self.phrasebook: Phrasebook | None = None
        self._collect()

    # One pass.

    def _collect(self) -> None:
        index, hasher = _Index(), hashlib.sha256()
        ids: list[str] = []
        held: list[bool] = []
        gains: list[float] = []
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        prompts: set[bytes] = set()
        wanted: list[tuple[float, float]] = []
        rewards = array("d")
        for run, rows in self._stream():
            number = len(ids)
            ids.append(run.run_id)
            normal = " ".join(run.prompt.casefold().split())
            held.append(held_out(normal, self.config.held_out, self.config.split_salt))
            prompts.add(hashlib.sha256(normal.encode()).digest()[:12])
            point = (run.point_valence, run.point_arousal)
            wanted.append(tuple(math.nan if axis is None else axis for axis in point))  # type: ignore[arg-type]
            hasher.update(repr((run.run_id, run.prompt, point, run.category)).encode())
            for row in rows:
                hasher.update(repr(row).encode())
            if said := self._human.get(run.run_id):
                hasher.update(repr(sorted(said.items())).encode())
            counts["images"] += sum(row.sha256 is not None for row in rows)
            counts["missing"] += sum(row.reward is None for row in rows)
            target = EmotionTarget(valence=run.valence, arousal=run.arousal, category=run.category)
            usable = self._rewarded(run.run_id, target, rows)
            rewards.extend(row.reward for row in usable if row.reward is not None)
            if self.config.phrases:
                index.rounds += [(number, *means) for means in _means(usable)]
            found, reason = self._index(index, number, run.run_id, target, usable)
            gains += found
            if reason is not None:
                dropped[reason] += 1
        self._ids = np.array(ids, dtype=np.str_)
        self._held = np.array(held, dtype=bool)
        if "across" in self.config.kinds:
            self._across(index, {run_id: number for number, run_id in enumerate(ids)})
        self._tables: dict[str, np.ndarray] = {
            "pairs": np.array(
                index.pairs,
                dtype=[("run", "u4"), ("round", "u2"), ("gain", "f4"), ("valence", "f4"), ("arousal", "f4")],
            ),
            "bests": np.array(index.bests, dtype=[("run", "u4"), ("round", "u2"), ("index", "u2")]),
            "preferences": np.array(
                index.preferences,
                dtype=[("run", "u4"), ("round", "u2"), ("index", "u2"),
                       ("other", "u4"), ("other_round", "u2"), ("other_index", "u2"), ("kind", "u1")],
            ),
            "groups": np.array([(run,) for run in index.groups], dtype=[("run", "u4")]),
            "phrases": np.array([], dtype=_PHRASE),
        }  # fmt: skip
        points = np.array(wanted, dtype=np.float64).reshape(-1, 2)
        if self.config.phrases:
            self._tables["phrases"] = self._translate(index, points)
        self.statistics = Statistics(
            runs=len(ids),
            prompts=len(prompts),
            images=counts["images"],
            rewarded=len(rewards),
            missing=counts["missing"],
            dropped=dict(sorted(dropped.items())),
            sources={
                name: {split: len(self._rows(name, split)) for split in ("train", "held_out")}
                for name in SOURCES
            },
            kinds={
                kind: int((self._tables["preferences"]["kind"] == place).sum())
                for place, kind in enumerate(_KINDS)
            },
            gains=Histogram.of(np.array(gains), -1, 1.5, 25),
            mean_gain=float(np.mean(gains)) if gains else None,
            rewards=Histogram.of(np.array(rewards), -2, 2, 40),
            valence=Histogram.of(points[:, 0][~np.isnan(points[:, 0])], -3, 3, 12),
            arousal=Histogram.of(points[:, 1][~np.isnan(points[:, 1])], -3, 3, 12),
            data_hash=hasher.hexdigest(),
            **self._phrases_used(),
        )

    def _stream(self) -> Iterator[tuple[Any, list[_Row]]]:
        """(run, its candidates), run by run; two cursors side by side, nothing held but one run."""
        r, run_id = runs.c, candidates.c.run_id
        columns = (r.run_id, r.prompt, r.valence, r.arousal, r.category, r.point_valence, r.point_arousal)
        of_runs = select(*columns).where(r.run_id.in_(self._chosen)).order_by(r.run_id)
        of_candidates = select(run_id, *_ROW).where(run_id.in_(self._chosen))
        of_candidates = of_candidates.order_by(run_id, candidates.c.round, candidates.c.index)
        with self._store.read() as one, self._store.read() as two:
            first = one.execution_options(yield_per=2000).execute(of_runs)
            second = two.execution_options(yield_per=5000).execute(of_candidates)
            grouped = itertools.groupby(second, key=lambda row: row[0])
            key, rows = next(grouped, (None, iter(())))
            for run in first:
                mine: list[_Row] = []
                if key == run.run_id:
                    mine = [_Row._make(row[1:]) for row in rows]
                    key, rows = next(grouped, (None, iter(())))
                yield run, mine

    def _usable(self, row: _Row) -> bool:
        if row.reward is None or row.sha256 is None:
            return False
        limit = self.config.max_spread
        return limit is None or row.spread is None or row.spread <= limit

    def _rewarded(self, run_id: str, target: EmotionTarget, rows: Sequence[_Row]) -> list[_Row]:
        """The rows that count. A person's reading stands above the model's: its reward is computed again."""
        said = self._human.get(run_id, {})
        out = []
        for row in rows:
            valence, arousal, _ = said.get(row.sha256 or "", _Said())
            if valence is not None or arousal is not None:
                row = row._replace(
                    valence=row.valence if valence is None else valence,
                    arousal=row.arousal if arousal is None else arousal,
                )
                if read := _critique(row, self._category(run_id, row)):
                    row = row._replace(reward=self._reward_again(run_id)(read, target), spread=None)
            if self._usable(row):
                out.append(row)
        return out

    def _category(self, run_id: str, row: _Row) -> Emotion | None:
        """What the critic named; read on its own, since people read few of the images."""
        c = candidates.c
        here = select(c.category).where(c.run_id == run_id, c.round == row.round, c.index == row.index)
        with self._store.read() as connection:
            return connection.scalar(here)

    def _reward_again(self, run_id: str) -> Reward:
        """What computes a reward anew; looked for once, and only where it is needed."""
        if self._again is None:
            self._again = self._find_reward(run_id)
        return self._again

    def _find_reward(self, run_id: str) -> Reward:
        """The reward that the log names; a newcomer's own by the path in its run's settings."""
        started = select(events.c.body).where(events.c.run_id == run_id, events.c.type == "run_started")
        with self._store.read() as connection:
            body = json.loads(connection.scalar(started) or "{}")
        path = body.get("settings", {}).get("loop", {}).get("reward")
        for spec in filter(None, (self.reward[0], path)):
            with contextlib.suppress(UserError):
                found = load_reward(spec)
                if (found.name, found.version) == self.reward:
                    return found
        raise UserError(
            f"rewards of run {run_id} have to be computed again, since people read its images or data.told is "
            f"read, but reward "
            f"{self.reward[0]} v{self.reward[1]} is not found by its name or by the run's loop.reward "
            f"({path or 'not logged'}): make it importable from there, or leave the run out by --from"
        )

    def _index(
        self, index: _Index, run: int, run_id: str, target: EmotionTarget, rows: list[_Row]
    ) -> tuple[list[float], str | None]:
        """Add one run to the sources; the gains of its rewritten rounds, and why it gives no pair."""
        if not rows:
            return [], "no reward"
        # The earliest of equals, as the log's own tables have it.
        best = max(rows, key=lambda row: (row.reward or 0.0, -row.round, -row.index))
        first = [row for row in rows if row.round == 0]
        index.bests.append((run, best.round, best.index))
        self._prefer(index, run, run_id, best, first, rows)
        group = first if self.config.group == "first" else rows
        values = [row.reward for row in group]
        if len(group) >= self.config.min_group and max(values) > min(values):  # type: ignore[type-var]
            index.groups.append(run)
        if not first:
            return [], "no reward in round 0"
        if self.config.refined == "winner" and best.round == 0:
            return [], "round 0 won"
        gains: dict[int, float] = {}
        told: dict[int, EmotionTarget] = {}
        for number in sorted({row.round for row in rows} - {0}):
            every = [row for row in rows if row.round == number]
            images = [row for row in every if self.config.gate == "all" or row is not best]
            if not images or (self.config.refined == "winner" and number != best.round):
                continue
            if self.config.told == "wanted":
                gained, unaided = ([row.reward for row in some] for some in (images, first))
            else:
                told[number] = _read(every, target)
                gained, unaided = (self._towards(told[number], run_id, some) for some in (images, first))
            gains[number] = float(np.mean(gained) - np.mean(unaided))  # type: ignore[arg-type]
        if not gains:
            alone = any(row.round for row in rows)
            return [], "one image a round: none is left to measure the gain with" if alone else "no rewrite"
        kept = {number: gain for number, gain in gains.items() if gain > self.config.min_gain}
        if self.config.refined == "best" and kept:
            number = max(kept, key=kept.__getitem__)
            kept = {number: kept[number]}
        for number, gain in kept.items():
            point = told[number].point if number in told else (None, None)
            valence, arousal = (math.nan if axis is None else axis for axis in point)
            index.pairs.append((run, number, gain, valence, arousal))
        return list(gains.values()), None if kept else "gain too small"

    def _translate(self, index: _Index, wanted: np.ndarray) -> np.ndarray:
        """The phrasebook's examples: first each run's own target, then others' in an order of chance."""
        rng, out = np.random.default_rng(0), []
        some = np.unique(np.array([run for run, *_ in index.rounds], dtype=np.int64))
        if len(some) > _PHRASED:
            some = np.sort(rng.choice(some, _PHRASED, replace=False))
        told: dict[tuple[int, int], tuple[str, str]] = {}
        for start in range(0, len(some), _CHUNK):
            numbers = {str(self._ids[run]): int(run) for run in some[start : start + _CHUNK]}
            heads, (_, prompts) = self._heads(list(numbers)), self._images(list(numbers))
            for (run_id, number), prompt in prompts.items():
                told[numbers[run_id], number] = heads[run_id].prompt, prompt
        tried = [
            Tried(*told[run, n], *means)
            for run, n, *means in index.rounds
            if not self._held[run] and (run, n) in told
        ]
        base = {run: means for run, number, *means in index.rounds if number == 0 and (run, 0) in told}
        if not tried or not base:
            lacking = "no run outside the held-out prompts" if base else "no run's round 0"
            raise UserError(
                f"data.phrases: {lacking} has readings: loosen --from or data.max_spread, or collect more"
            )
        self.phrasebook = book = build(tried, wanted[~self._held], self.config.phrases)
        asked = np.array(sorted(base), dtype=np.int64)
        neutral, which = np.unique([told[run, 0][0] for run in asked], return_inverse=True)
        expected = book.expect(neutral.tolist())[which]
        reward = self._reward_again(str(self._ids[asked[0]]))
        for slot in range(self.config.phrase_targets):
            left = _PHRASE_TARGETS - slot * len(asked)
            if left <= 0:
                break
            targets = wanted[asked if slot == 0 else rng.integers(len(wanted), size=len(asked))]
            best = book.misses(expected, targets[None])[0].argmin(1)
            rows = zip(asked[:left], targets[:left], best[:left], strict=True)
            for place, (run, point, phrase) in enumerate(rows):
                valence, arousal = (None if math.isnan(axis) else float(axis) for axis in point)
                if valence is None and arousal is None:
                    continue
                target = EmotionTarget(valence=valence, arousal=arousal)
                hit = _read_as([*expected[place, phrase].tolist(), float(book.alignment[phrase])])
                gain = value_now(reward, hit, target) - value_now(reward, _read_as(base[run]), target)
                if gain > self.config.min_gain:
                    out.append((run, *point, phrase, gain))
        return np.array(out, dtype=_PHRASE)

    def _phrases_used(self) -> dict[str, Any]:
        if self.phrasebook is None:
            return {}
        numbers = Counter(self._tables["phrases"]["phrase"].tolist())
        used = {self.phrasebook.phrases[number]: count for number, count in numbers.most_common()}
        return {"phrasebook": used, "reader_error": tuple(self.phrasebook.reader.errors.mean(0).tolist())}

    def _towards(self, target: EmotionTarget, run_id: str, rows: Sequence[_Row]) -> list[float]:
        """Rewards of images for another target than their run's."""
        reward = self._reward_again(run_id)
        return [value_now(reward, read, target) for row in rows if (read := _critique(row, None))]

    def _prefer(
        self, index: _Index, run: int, run_id: str, best: _Row, first: list[_Row], rows: list[_Row]
    ) -> None:
        def add(kind: Kind, winner: _Row, loser: _Row) -> None:
            places = (run, winner.round, winner.index, run, loser.round, loser.index, _KINDS.index(kind))
            index.preferences.append(places)

        kinds = self.config.kinds
        rated = [
            (said.rating, row)
            for row in rows
            if (said := self._human.get(run_id, {}).get(row.sha256 or "")) and said.rating is not None
        ]
        if "human" in kinds and len(rated) > 1:
            high, low = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
            if high[0] != low[0]:
                add("human", high[1], low[1])
                return
        if not first:
            return
        worst = min(first, key=lambda row: row.reward or 0.0)
        top = max(first, key=lambda row: row.reward or 0.0)
        if (
            "rounds" in kinds
            and best.round > 0
            and (best.reward or 0) - (worst.reward or 0) >= self.config.min_margin
        ):
            add("rounds", best, worst)
        if "within" in kinds and (top.reward or 0) - (worst.reward or 0) >= max(self.config.min_margin, 1e-9):
            add("within", top, worst)

    def _across(self, index: _Index, numbers: dict[str, int]) -> None:
        """Best images of two runs with one prompt: each is right for its own target, wrong for the other."""
        best = {run: (round_, place) for run, round_, place in index.bests}
        columns = (runs.c.run_id, runs.c.prompt_hash, runs.c.point_valence, runs.c.point_arousal)
        query = select(*columns).order_by(runs.c.prompt_hash, runs.c.run_id)
        with self._store.read() as connection:
            rows = connection.execution_options(yield_per=2000).execute(query)
            for _, group in itertools.groupby(rows, key=lambda row: row.prompt_hash):
                members = [row for row in group if numbers.get(row.run_id) in best]
                for one, other in zip(members, members[1:] + members[:1], strict=True):
                    if one.run_id == other.run_id or _distance(one, other) < 1.0:
                        continue
                    a, b = numbers[one.run_id], numbers[other.run_id]
                    index.preferences.append((a, *best[a], b, *best[b], _KINDS.index("across")))

    # Rows on demand.

    def _rows(self, source: str, split: Split) -> np.ndarray:
        table = self._tables[source]
        return np.flatnonzero(self._held[table["run"]] == (split == "held_out"))

    def critics(self) -> list[str]:
        """The models whose readings the rewards come from, as the first critique of each run names them."""
        first = select(events.c.body).where(
            events.c.run_id.in_(self._chosen),
            events.c.type == "critiqued",
            events.c.round == 0,
            events.c.index == 0,
        )
        with self._store.read() as connection:
            found = connection.execute(first.execution_options(yield_per=1000))
            return sorted({json.loads(body)["model"] for (body,) in found})

    def examples(self, source: str, split: Split = "train") -> Examples:
        """The examples of a source.

        Raises:
            UserError: There are none, with what was dropped and why.
        """
        rows = self._rows(source, split)
        if split == "train" and not len(rows):
            why = ", ".join(f"{count} × {reason}" for reason, count in self.statistics.dropped.items())
            raise UserError(
                f"the {self.statistics.runs} runs give no {source} to train on"
                + (f" ({why})" if why and source == "pairs" else "")
                + ": loosen data.min_gain, data.min_margin or --from, or collect more runs"
            )
        return Examples(self, source, rows)

    def fetch(self, source: str, rows: Sequence[int] | np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Examples by row number; where one has several images to choose from, `rng` chooses.

        `rng` is used the same number of times whatever the rows hold.
        """
        table = self._tables[source]
        picked = table[np.asarray(rows, dtype=np.int64)]
        chances = rng.random(len(picked))
        ids = [str(self._ids[run]) for run in picked["run"]]
        more = [str(self._ids[run]) for run in picked["other"]] if source == "preferences" else []
        heads, (images, prompts) = self._heads(ids), self._images(ids + more)
        out = []
        for number, row, run_id, chance in zip(rows, picked, ids, chances, strict=True):
            example = replace(heads[run_id], number=int(number))
            mine = images[run_id]
            match source:
                case "pairs":
                    inside = [it for it in mine.values() if it.round == row["round"]]
                    shown = inside[int(chance * len(inside))].sha256
                    refined = prompts[run_id, int(row["round"])]
                    example = replace(example, refined=refined, advantage=float(row["gain"]), image=shown)
                    if axes := _axes(row):
                        example = replace(
                            example, target=EmotionTarget.model_validate(axes), wanted=example.target
                        )
                case "phrases":
                    assert self.phrasebook is not None
                    axes = _axes(row)
                    example = replace(
                        example,
                        refined=f"{example.prompt}{self.phrasebook.phrases[row['phrase']]}",
                        advantage=float(row["gain"]),
                        phrase=int(row["phrase"]),
                        target=EmotionTarget.model_validate(axes),
                    )
                case "bests":
                    example = replace(
                        example, winner=mine[_Place(int(row["round"]), int(row["index"]))].sha256
                    )
                case "preferences":
                    theirs = images[str(self._ids[row["other"]])]
                    example = replace(
                        example,
                        winner=mine[_Place(int(row["round"]), int(row["index"]))].sha256,
                        loser=theirs[_Place(int(row["other_round"]), int(row["other_index"]))].sha256,
                        kind=_KINDS[row["kind"]],
                    )
                case "groups":
                    group = self._rewarded(run_id, example.target, list(mine.values()))
                    if self.config.group == "first":
                        group = [it for it in group if it.round == 0]
                    one = group[int(chance * len(group))]
                    rewards = tuple(float(it.reward or 0.0) for it in group)
                    example = replace(example, image=one.sha256, reward=one.reward, rewards=rewards)
            out.append(example)
        return out

    def _heads(self, ids: Sequence[str]) -> dict[str, Example]:
        r = runs.c
        query = select(r.run_id, r.prompt, r.valence, r.arousal, r.category).where(r.run_id.in_(set(ids)))
        with self._store.read() as connection:
            return {
                row.run_id: Example(
                    row.run_id,
                    row.prompt,
                    EmotionTarget(valence=row.valence, arousal=row.arousal, category=row.category),
                )
                for row in connection.execute(query)
            }

    def _images(self, ids: Sequence[str]) -> tuple[dict[str, dict[_Place, _Row]], dict[tuple[str, int], str]]:
        """Candidates with an image by run and place, and the prompts of their rounds."""
        c = candidates.c
        query = select(c.run_id, c.prompt, *_ROW).where(c.run_id.in_(set(ids)), c.sha256.is_not(None))
        query = query.order_by(c.run_id, c.round, c.index)
        found: dict[str, dict[_Place, _Row]] = {}
        prompts: dict[tuple[str, int], str] = {}
        with self._store.read() as connection:
            for run_id, prompt, *rest in map(tuple, connection.execute(query)):
                row = _Row(*rest)
                found.setdefault(run_id, {})[_Place(row.round, row.index)] = row
                prompts[run_id, row.round] = prompt
        return found, prompts


class Examples:
    """Random access to the examples of one source and split."""

    def __init__(self, dataset: Dataset, source: str, rows: np.ndarray) -> None:
        self.dataset, self.source, self._rows = dataset, source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, numbers: Sequence[int], rng: np.random.Generator | None = None) -> list[Example]:
        """Examples by number, in that order."""
        return self.dataset.fetch(self.source, self._rows[list(numbers)], rng or np.random.default_rng(0))


def origin(store: TraceStore, where: RunFilter | None = None) -> tuple[Base, tuple[str, str]]:
    """What made the images of the picked runs, and the name and version of their rewards.

    Raises:
        UserError: As `Dataset`.
    """
    c = candidates.c
    mine = c.run_id.in_(_chosen(where))
    with store.read() as connection:
        if connection.scalar(select(runs.c.run_id).limit(1)) is None:
            raise UserError(f"the log in {store.home} is empty: make runs first (`emoloop collect`)")
        images, rewarded = connection.execute(
            select(func.count(c.sha256), func.count(c.reward)).where(mine)
        ).one()
        if not images:
            raise UserError(
                "no finished run with images answers to --from: widen it (see `emoloop traces list`)"
            )
        if not rewarded:
            reason = connection.scalar(select(c.missing).where(mine, c.missing.is_not(None)).limit(1))
            raise UserError(
                f"none of the {images} images has a reward: "
                f"all critiques are missing ({reason or 'no reason'})"
            )
        made = {Base(*row) for row in connection.execute(
            select(c.model, c.revision, c.adapter).where(mine, c.sha256.is_not(None)).distinct()
        )}  # fmt: skip
        if len(made) > 1:
            listed = "; ".join(sorted(_describe(base) for base in made))
            raise UserError(
                f"the runs come from {len(made)} base models ({listed}): "
                "pick one with --from model=… or adapter=…"
            )
        named = select(c.reward_name, c.reward_version).where(mine, c.reward.is_not(None)).distinct()
        rewards = [tuple(row) for row in connection.execute(named)]
        if len(rewards) > 1:
            listed = ", ".join(sorted(f"{name} v{version}" for name, version in rewards))
            raise UserError(
                f"the runs carry different rewards ({listed}): they cannot be compared; narrow --from"
            )
    return made.pop(), (str(rewards[0][0]), str(rewards[0][1]))


def _chosen(where: RunFilter | None) -> Select[Any]:
    """Ids of the runs that the filter picks, as a subquery. One that still runs would change the data."""
    where = where or RunFilter()
    ids = where.apply(select(runs.c.run_id))
    return ids.where(runs.c.status != RunStatus.RUNNING) if where.status is None else ids


def held_out(prompt: str, share: float, salt: str) -> bool:
    """Whether a neutral prompt belongs to the held-out split: by hash, so that it never changes sides."""
    digest = hashlib.sha256(f"{salt}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def source_for(keys: frozenset[str], config: DataConfig | None = None) -> str:
    """The narrowest source that gives all these batch keys; `phrases` where the configuration asks for them.

    Raises:
        UserError: None does; names what is missing from the nearest one.
    """
    wanted = (
        ["phrases"] if config is not None and config.phrases else [it for it in SOURCES if it != "phrases"]
    )
    for name in wanted:
        if keys <= SOURCES[name]:
            return name
    nearest = min(wanted, key=lambda name: len(keys - SOURCES[name]))
    missing = ", ".join(sorted(keys - SOURCES[nearest]))
    hint = " (set data.phrases=0, or objective.on_policy=1 for opd)" if nearest == "phrases" else ""
    raise UserError(
        f"no source of the log gives all of {', '.join(sorted(keys))}: {nearest} lack {missing}{hint}"
    )


def _describe(base: Base) -> str:
    revision = f"@{base.revision[:8]}" if base.revision else ""
    return f"{base.model}{revision}" + (f" + adapter {base.adapter[:8]}" if base.adapter else "")


def _distance(one: Any, other: Any) -> float:
    """How far two targets are apart, on the axes that both want."""
    pairs = ((one.point_valence, other.point_valence), (one.point_arousal, other.point_arousal))
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _critique(row: _Row, category: Emotion | None) -> Critique | None:
    """A candidate's reading as rewards take it."""
    if row.valence is None or row.arousal is None:
        return None
    alignment = 1.0 if row.alignment is None else row.alignment
    return Critique(valence=row.valence, arousal=row.arousal, category=category, alignment=alignment)


def _read_as(means: Sequence[float]) -> Critique:
    """Mean valence, arousal and alignment as rewards take them."""
    valence, arousal, alignment = means
    return Critique(valence=valence, arousal=arousal, category=None, alignment=alignment)


def _means(rows: Sequence[_Row]) -> Iterator[tuple[int, float, float, float]]:
    """(round, valence, arousal, alignment) in the mean over each round's images."""
    for number in sorted({row.round for row in rows}):
        read = [it for row in rows if row.round == number and (it := _critique(row, None))]
        if read:
            yield (
                number,
                fmean(it.valence for it in read),
                fmean(it.arousal for it in read),
                fmean(it.alignment for it in read),
            )


def _axes(row: np.void) -> dict[str, float]:
    """What a table's row tells in place of the run's own target; empty where nothing."""
    return {axis: float(row[axis]) for axis in ("valence", "arousal") if not math.isnan(row[axis])}


def _read(rows: Sequence[_Row], wanted: EmotionTarget) -> EmotionTarget:
    """The mean reading of a round, on the axes that were wanted."""
    means = {
        axis: float(np.mean([value for row in rows if (value := getattr(row, axis)) is not None]))
        for axis, aim in zip(("valence", "arousal"), wanted.point, strict=True)
        if aim is not None
    }
    return EmotionTarget.model_validate(means)


def _human_feedback(store: TraceStore, chosen: Select[Any]) -> dict[str, dict[str, _Said]]:
    """What people said, by run and image; the latest word on each axis stands."""
    from ...events import EVENT, HumanFeedback

    mine = events.c.run_id.in_(chosen) & (events.c.type == "human_feedback")
    query = select(events.c.body).where(mine).order_by(events.c.run_id, events.c.seq)
    said: dict[str, dict[str, _Said]] = {}
    with store.read() as connection:
        for body in connection.execution_options(yield_per=500).scalars(query):
            event = EVENT.validate_json(body)
            assert isinstance(event, HumanFeedback)
            given = event.model_dump(include=set(_Said._fields), exclude_none=True)
            if event.sha256 is not None and given:
                images = said.setdefault(event.run_id, {})
                images[event.sha256] = images.get(event.sha256, _Said())._replace(**given)
    return said
