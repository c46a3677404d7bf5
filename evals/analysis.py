"""From rows to figures: every number with its n and interval, the split of the gain, and what looks wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..domain import Critique
from ..tools.measures import diversity
from . import metrics, shortcut
from .metrics import mean
from .records import Row
from .stats import Estimate, difference, estimate, sign_test
from .suites import Suite
from .wording import IMAGES, METRICS

#: How far a guard may fall before it counts: 3 points of alignment or subject accuracy; of the base's diversity a
#: quarter is left at least, since images of one feeling are more alike than neutral ones (an honest adapter's have two
#: fifths).
ALIGNMENT_SLACK, DIVERSITY_SLACK = 0.03, 0.25

#: What distilled weights have to be better than, each trained or found on the same log.
CONTROLS = ("tokens", "lora", "lookup", "planner", "rewrite")

#: Parts of the loop's gain: name, what it says, from which arm to which.
_PARTS = (
    ("selection", "picking the best of as many images", "base", "best_of_n"),
    ("words", "knowing the words: one rewrite, no feedback", "base", "rewrite"),
    ("both", "one rewrite and picking the best", "base", "rewrite_best_of_n"),
    ("variety", "as many rewrites as images", "rewrite_best_of_n", "diverse_best_of_n"),
    ("total", "the loop", "base", "loop"),
    ("teachable", "the loop's prompt without its selection", "base", "teacher"),
)

#: What feedback is measured against: the nearest arm without any that a suite has.
_WITHOUT_FEEDBACK = ("diverse_best_of_n", "rewrite_best_of_n")


@dataclass(frozen=True)
class Column:
    """One arm's values of one metric, aligned with `units`.

    Attributes:
        values: One for each unit; None is missing.
        units: What the values belong to: request ids, or sweeps.
        clusters: The neutral prompt of each unit.
    """

    values: list[float | None]
    units: list[str]
    clusters: list[str]

    def estimate(self) -> Estimate:
        """Mean and interval."""
        return estimate([self.values], self.clusters)


def of_request(
    row: Row, pace: Mapping[str, float] | None = None, budget: int | None = None
) -> dict[str, float | None]:
    """The metrics that one request has: means over what was handed over, and the cost of one such image.

    Args:
        row: The row.
        pace: Seconds for one `image`, `critique` and `rewrite`; without it there are no seconds.
        budget: Images that an arm that selects may make; without it there is no `images_to_target`.
    """
    target = row.request.target
    readings = [reading for reading in row.readings if reading]
    seen_by_guard = row.guard_of_delivered
    guards = [reading for reading in seen_by_guard if reading]

    def looks(name: str) -> float | None:
        """From the guard where it says such a thing, else from the judge."""
        seen = mean(getattr(reading, name) for reading in guards)
        return mean(getattr(reading, name) for reading in readings) if seen is None else seen

    led = [
        (count, reading and metrics.error(reading, target))
        for (count, _), reading in zip(row.leaders, row.led, strict=True)
    ]
    features = [reading.features for reading in row.guard if reading and reading.features]
    errors = [metrics.axis_errors(reading, target) for reading in readings]
    bias, spread = metrics.bias_and_spread(readings, target)
    return {
        "error": mean(metrics.error(reading, target) for reading in readings),
        "valence_error": mean(valence for valence, _ in errors),
        "arousal_error": mean(arousal for _, arousal in errors),
        "guard_error": mean(metrics.error(reading, target) for reading in guards),
        "dispute": mean(metrics.apart(*both) for both in zip(row.readings, seen_by_guard, strict=False)),
        "bias": bias,
        "spread": spread,
        "emotion_accuracy": mean(metrics.emotion_right(reading, target) for reading in readings),
        "subject_accuracy": mean(reading.subject_right for reading in readings),
        "alignment": looks("alignment"),
        "quality": looks("quality"),
        "aesthetic": looks("aesthetic"),
        "preference": looks("preference"),
        "diversity": float(diversity(np.array(features))) if len(features) > 1 else None,
        "content_kept": looks("kept"),
        "drift": looks("unasked"),
        "reward": mean(one.reward for one in row.handed_over),
        "estimate_bias": mean(_bias(row)),
        **{
            f"error_at_{images}": metrics.error_at(images, led)
            for images in IMAGES
            if budget is None or images <= budget
        },
        "images_to_target": None if budget is None else metrics.images_to_target(led, budget),
        **_cost(row, pace or {}),
    }


def _bias(row: Row) -> Iterator[float | None]:
    """The judge's error minus the critic's on each image handed over: above 0 the critic is too pleased with it."""
    target = row.request.target
    for one, reading in zip(
        row.handed_over, row.readings, strict=False
    ):  # one without a picture has a reading alone
        ours = metrics.error(one.critique, target) if isinstance(one.critique, Critique) else None
        theirs = metrics.error(reading, target) if reading else None
        yield None if ours is None or theirs is None else theirs - ours


def _cost(row: Row, pace: Mapping[str, float]) -> dict[str, float | None]:
    cost = row.cost
    if row.failure:
        return dict.fromkeys(("images", "lvlm_calls", "tokens", "seconds"))
    spent = {"image": cost.images, "critique": cost.critiques, "rewrite": cost.rewrites}
    known = all(key in pace for key, count in spent.items() if count)
    return {
        "images": cost.images,
        "lvlm_calls": cost.critiques * cost.samples + cost.rewrites,
        "tokens": cost.tokens,
        "seconds": sum(pace[key] * count for key, count in spent.items() if count) if known else None,
    }


def of_sweeps(rows: Sequence[Row], suite: Suite | None = None) -> dict[str, Column]:
    """τ and smoothness of one arm's rows, one unit for each sweep: those that the suite declares, else all found.

    An arm that hands over several images has as many sweeps of the same noise; their mean is the sweep's
    value.
    """
    found: defaultdict[str, list[tuple[float | None, str, str]]] = defaultdict(list)
    for axis, places in metrics.sweeps([row.request for row in rows], suite and suite.declared):
        chosen = [rows[place] for place in places]
        wanted = [getattr(row.request.target, axis) for row in chosen]
        taus, steps = [], []
        for lane in range(min(len(row.handed_over) for row in chosen)):
            read = [row.readings[lane] for row in chosen]
            taus.append(metrics.rank_tau(wanted, [one and getattr(one, axis) for one in read]))
            seen = [row.guard_of_delivered[lane] for row in chosen]
            steps.append(metrics.smoothness([one and one.features for one in seen]))
        unit = f"{axis}: {' '.join(row.request.id for row in chosen)}"
        for key, values in ((f"{axis}_tau", taus), ("smoothness", steps)):
            found[key].append((mean(values), unit, chosen[0].request.prompt))
    return {key: Column(*map(list, zip(*units, strict=True))) for key, units in found.items()}


class Table:
    """Columns of all arms, and the statements made of them.

    Args:
        rows: From the runner.
        pace: Seconds for one image, critique and rewrite.
        suite: What was asked: its budget, kinds and sweeps.
    """

    def __init__(
        self, rows: Sequence[Row], pace: Mapping[str, float] | None = None, suite: Suite | None = None
    ) -> None:
        self.rows, self.suite = list(rows), suite
        self.arms = list(dict.fromkeys(row.arm for row in rows))
        self.columns: dict[str, dict[str, Column]] = {}
        for arm in self.arms:
            mine = [row for row in rows if row.arm == arm]
            together = shortcut.of_rows(mine)
            values = [
                of_request(row, pace, suite and suite.budget) | more
                for row, more in zip(mine, together, strict=True)
            ]
            units, clusters = [row.request.id for row in mine], [row.request.prompt for row in mine]
            columns = {key: Column([v[key] for v in values], units, clusters) for key in values[0]}
            self.columns[arm] = {
                key: column
                for key, column in (columns | of_sweeps(mine, suite)).items()
                if any(value is not None for value in column.values)
            }

    def sweeps(self, arm: str) -> dict[str, list[dict[str, Any]]]:
        """The values behind τ and smoothness of an arm, one for each sweep."""
        return {
            key: [
                {"sweep": unit, "prompt": prompt, "value": value}
                for value, unit, prompt in zip(column.values, column.units, column.clusters, strict=True)
            ]
            for key, column in self.columns[arm].items()
            if key in ("valence_tau", "arousal_tau", "smoothness")
        }

    def has(self, *arms: str, metric: str = "error") -> bool:
        """Whether all of these arms have the metric."""
        return all(metric in self.columns.get(arm, {}) for arm in arms)

    def paired(self, metric: str, *arms: str) -> tuple[list[list[float | None]], list[str]]:
        """Columns of several arms over the units that they share, and the clusters of those."""
        columns = [self.columns[arm][metric] for arm in arms]
        shared = [unit for unit in columns[0].units if all(unit in column.units for column in columns[1:])]
        where = [dict(zip(column.units, column.values, strict=True)) for column in columns]
        prompts = dict(zip(columns[0].units, columns[0].clusters, strict=True))
        return [[values[unit] for unit in shared] for values in where], [prompts[unit] for unit in shared]

    def difference(self, metric: str, ours: str, theirs: str) -> tuple[Estimate, float | None]:
        """Mean of ours minus theirs with its interval, and the sign test's p."""
        (a, b), clusters = self.paired(metric, ours, theirs)
        return difference(a, b, clusters), sign_test(a, b, clusters)

    def ratio(self, metric: str, ours: str, theirs: str) -> Estimate:
        """Mean of ours over mean of theirs."""
        columns, clusters = self.paired(metric, ours, theirs)
        return estimate(columns, clusters, lambda a, b: a / b)

    def error_reduction(self, arm: str) -> Estimate:
        """1 - error of the arm / error of base."""
        columns, clusters = self.paired("error", arm, "base")
        return estimate(columns, clusters, lambda a, b: 1 - a / b)

    def distinct(self, arm: str) -> Estimate:
        """Distinct bigrams over all bigrams of what the arm's prompts add."""
        column, new = self.columns[arm]["bigrams"], self.columns[arm]["new_bigrams"]
        return estimate([new.values, column.values], column.clusters, lambda some, every: some / every)

    def amortisation(self, arm: str) -> Estimate:
        """Share of the loop's improvement that the arm has; None unless the loop surely improves on base."""
        columns, clusters = self.paired("error", "base", arm, "loop")
        improvement = self.difference("error", "base", "loop")[0]
        if improvement.low is None or improvement.low <= 0:
            return Estimate(None, n=improvement.n, clusters=improvement.clusters)
        return estimate(columns, clusters, metrics.amortisation)

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """arm → metric → estimate, with the derived ones where their arms are there."""
        found = {
            arm: {key: columns[key].estimate() for key in METRICS if key in columns}
            for arm, columns in self.columns.items()
        }
        for arm in self.arms:
            if self.has(arm, metric="bigrams"):
                found[arm]["distinct_2"] = self.distinct(arm)
            if (gap := self.paraphrase_gap(arm)).value is not None:
                found[arm]["paraphrase_gap"] = gap
            if arm != "base" and self.has(arm, "base"):
                found[arm]["error_reduction"] = self.error_reduction(arm)
            if self.has(arm, "base", "loop"):
                found[arm]["amortisation"] = self.amortisation(arm)
        return found

    def change(self, before: str, after: str, metric: str = "error") -> dict[str, Any]:
        """The fall of the error from one arm to another: the paired estimate and the sign test's p."""
        found, p = self.difference(metric, before, after)
        return {**asdict(found), "p": p}

    def kinds(self) -> dict[str, dict[str, Estimate]]:
        """kind of prompt → arm → error, where the suite names kinds."""
        kind_of = self.suite.kinds if self.suite else {}
        found: dict[str, dict[str, Estimate]] = {}
        for kind in dict.fromkeys(filter(None, kind_of.values())):
            for arm in (arm for arm in self.arms if self.has(arm)):
                column = self.columns[arm]["error"]
                values = [
                    value if kind_of[prompt] == kind else None
                    for value, prompt in zip(column.values, column.clusters, strict=True)
                ]
                found.setdefault(kind, {})[arm] = estimate([values], column.clusters)
        return found

    def paraphrase_gap(self, arm: str) -> Estimate:
        """Error of paraphrases minus error of the prompts that they restate, target by target."""
        restated = self.suite.restated if self.suite else {}
        mine = [row for row in self.rows if row.arm == arm]
        errors = {(row.request.prompt, row.request.target): of_request(row)["error"] for row in mine}
        asked = [
            (it.prompt, restated[it.prompt], it.target)
            for it in (row.request for row in mine)
            if it.prompt in restated
        ]
        ours = [errors[prompt, target] for prompt, _, target in asked]
        theirs = [errors.get((plain, target)) for _, plain, target in asked]
        return difference(ours, theirs, [plain for _, plain, _ in asked])

    def gains(self) -> list[dict[str, Any]]:
        """Where the loop's gain comes from, as falls of the error with paired intervals."""
        return [
            {"part": part, "about": about, "from": before, "to": after, **self.change(before, after, metric)}
            for part, about, before, after, metric in [*((*it, "error") for it in _PARTS), *self._feedback()]
            if self.has(before, after, metric=metric)
        ]

    def _feedback(self) -> Iterator[tuple[str, str, str, str, str]]:
        """What the loop adds to the nearest arm without feedback, in the end and at fewer images."""
        without = next((arm for arm in _WITHOUT_FEEDBACK if self.has(arm)), None)
        if without:
            yield "feedback", f"what the loop adds to {without}", without, "loop", "error"
        if without == _WITHOUT_FEEDBACK[0]:
            for images in IMAGES:
                about = f"the same after {images} images of each"
                yield f"feedback_at_{images}", about, without, "loop", f"error_at_{images}"

    def comparisons(self) -> list[dict[str, Any]]:
        """All pairs of arms: difference of the error (negative: the first is nearer), interval, sign test."""
        return [
            {"a": a, "b": b, "metric": "error", **self.change(a, b)}
            for a, b in combinations(self.arms, 2)
            if self.has(a, b)
        ]


def verdict(gains: Iterable[dict[str, Any]]) -> str | None:
    """One plain sentence on feedback's own part; None where the suite has not the arms for it."""
    part = next((gain for gain in gains if gain["part"] == "feedback"), None)
    if part is None or part["value"] is None:
        return None
    value = f"{part['value']:+.2f} points"
    if part["low"] is None:
        return f"Feedback's own part is {value} over {part['n']} requests; one prompt gives no interval."
    interval = f"{value} (95 % {part['low']:+.2f} to {part['high']:+.2f}, n = {part['n']})"
    if part["low"] > 0:
        return (
            f"Feedback adds to selection and to knowing the words: it takes another {interval} off the error."
        )
    if part["high"] < 0:
        return f"Feedback hurts here: the loop loses to {part['from']} at as many images: {interval}."
    return f"Feedback adds nothing that can be told from chance here: {interval} off the error."


def flags(table: Table, trained: Sequence[str]) -> list[dict[str, Any]]:
    """Trained arms whose reward rose while the judge or a guard says otherwise: the marks of reward hacking.

    Args:
        table: The columns.
        trained: Names of the arms that run on an adapter.

    Returns:
        One entry for each mark: arm, what, and the sentence for the report. Differences are against `base`: the
        teacher's pictures of one prompt are nearly one picture, and no yardstick for diversity.
    """
    found: list[dict[str, Any]] = []
    for arm in trained:
        if not table.has(arm, "base", metric="reward"):
            continue
        reward, _ = table.difference("reward", arm, "base")
        if reward.low is None or reward.low <= 0:
            continue
        marks: list[tuple[str, str]] = []
        if table.has(arm, "base"):
            error, _ = table.difference("error", arm, "base")
            if error.high is not None and error.high >= 0:
                marks.append(
                    ("judge", f"the judge's error did not fall ({error.value:+.2f}, {_span(error)}).")
                )
        for metric in ("alignment", "subject_accuracy"):
            if table.has(arm, "base", metric=metric):
                change, _ = table.difference(metric, arm, "base")
                if change.high is not None and change.high < -ALIGNMENT_SLACK:
                    what = f"{metric.replace('_', ' ')} changed by {change.value:+.2f} ({_span(change)})."
                    marks.append((metric, what))
        if table.has(arm, "base", metric="diversity"):
            ratio = table.ratio("diversity", arm, "base")
            if ratio.high is not None and ratio.high < DIVERSITY_SLACK:
                what = f"diversity over seeds is {ratio.value:.0%} of the base's ({_span(ratio)})."
                marks.append(("diversity", what))
        rose = f"{arm}: the reward rose by {reward.value:.2f} over base, but "
        found += [{"arm": arm, "what": what, "sentence": rose + sentence} for what, sentence in marks]
    return found


def worth(table: Table, whole: str | None) -> dict[str, Estimate]:
    """What distilled weights add, as falls of the error with paired intervals: above 0 they are nearer.

    Args:
        table: The columns.
        whole: The arm with all of an adapter.

    Returns:
        `whole_minus_<control>` for each of `CONTROLS` that is there, and `direct_gain` where the arms `text` (the start
        on text alone) and `direct` are.
    """
    pairs = {f"whole_minus_{control}": (control, whole) for control in CONTROLS if whole} | {
        "direct_gain": ("text", "direct")
    }
    return {
        name: table.difference("error", before, after)[0]
        for name, (before, after) in pairs.items()
        if after and table.has(before, after)
    }


def _span(found: Estimate) -> str:
    return f"95 % {found.low:+.2f} to {found.high:+.2f}"


def figures(table: Table, measures: Mapping[str, Estimate] | None = None) -> dict[str, float]:
    """The flat map: `<arm>_<metric>` and the suite's measures with `_low`, `_high`; `gain_<part>`; `n`.

    What is undefined (an interval over one prompt, a ratio over nothing) has no key.
    """
    flat: dict[str, float | int | None] = {"n": len({row.request.id for row in table.rows})}
    for arm, found in table.estimates().items():
        for metric, value in found.items():
            flat |= value.figures(f"{arm}_{metric}")
            if metric == "emotion_accuracy":  # as the papers call it
                flat |= value.figures(f"{arm}_emo_a")
    for gain in table.gains():
        flat |= {
            f"gain_{gain['part']}{end}": gain[key]
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        flat[f"gain_{gain['part']}_p"] = gain["p"]
    for name, found in (measures or {}).items():
        flat |= found.figures(name)
    return {name: value for name, value in flat.items() if value is not None}
