"""How sure a number is: intervals and tests over neutral prompts.

Images of one prompt resemble each other, so they are not independent evidence: the unit that is drawn again
is the *neutral prompt* with all of its requests (a cluster bootstrap), never the single image. Differences
between arms are taken within a request first, because all arms share prompts, targets and seeds. Each prompt
weighs the same, however many requests it has: what is to be known is how other prompts would fare.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap

#: Draws of a bootstrap and the seed of its generator: fixed, so that a report can be made again to the digit.
RESAMPLES, SEED = 9999, 0


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The estimate; None where there was nothing to estimate it from.
        low: Lower end; None where fewer than two prompts stand behind the estimate.
        high: Upper end; likewise.
        n: Requests (or sweeps) behind it.
        clusters: Neutral prompts behind it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    clusters: int = 0

    def figures(self, name: str) -> dict[str, float | None]:
        """Flat keys `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def estimate(
    columns: Sequence[Sequence[float | None]],
    clusters: Sequence[Hashable],
    statistic: Callable[..., np.ndarray] = lambda mean: mean,
) -> Estimate:
    """A function of means, with a percentile interval from a paired cluster bootstrap.

    Rows that miss a value in any column are left out of all of them, which keeps the columns paired.

    Args:
        columns: One or more equally long columns, one value for each request; None is missing.
        clusters: The cluster (neutral prompt) of each row.
        statistic: Takes the mean of each column over clusters (each the mean of its rows), vectorised, and
            gives the number; the default is the mean of a single column.

    Returns:
        The estimate. A statistic that is not finite on the data itself (a ratio over nothing) gives None.

    Raises:
        ValueError: Columns of different length.
    """
    if any(len(column) != len(clusters) for column in columns):
        raise ValueError("columns and clusters differ in length")
    rows = [
        (cluster, values)
        for cluster, *values in zip(clusters, *columns, strict=True)
        if all(value is not None and np.isfinite(value) for value in values)
    ]
    if not rows:
        return Estimate(None)
    order: dict[Hashable, int] = {}
    index = np.array([order.setdefault(cluster, len(order)) for cluster, _ in rows])
    table = np.array([values for _, values in rows], dtype=float).T
    counts = np.bincount(index)
    means = [np.bincount(index, weights=column) / counts for column in table]

    def of(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(statistic(*(column.mean(axis=axis) for column in drawn)))

    value = float(of(*means))
    if not np.isfinite(value):
        return Estimate(None, n=len(rows), clusters=len(order))
    if len(order) < 2:
        return Estimate(value, n=len(rows), clusters=len(order))
    with warnings.catch_warnings():
        # Where every prompt has the same value the interval has no width, which is right and needs no warning.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap(
            means,
            of,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=RESAMPLES,
            batch=1000,
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    finite = np.isfinite(low) and np.isfinite(high)
    return Estimate(value, low if finite else None, high if finite else None, len(rows), len(order))


def difference(
    ours: Sequence[float | None], theirs: Sequence[float | None], clusters: Sequence[Hashable]
) -> Estimate:
    """Mean of `ours - theirs` over requests that have both, each prompt weighing the same, with its interval."""
    return estimate([ours, theirs], clusters, lambda a, b: a - b)


def sign_test(
    ours: Sequence[float | None], theirs: Sequence[float | None], clusters: Sequence[Hashable]
) -> float | None:
    """Two-sided sign test over prompts: how likely so lopsided a count of wins is by chance.

    Args:
        ours: One value for each request.
        theirs: The other arm's values of the same requests.
        clusters: The neutral prompt of each request.

    Returns:
        The p-value; prompts whose mean difference is exactly 0 don't count, and None means that none is left.
    """
    by_cluster: dict[Hashable, list[float]] = {}
    for cluster, a, b in zip(clusters, ours, theirs, strict=True):
        if a is not None and b is not None:
            by_cluster.setdefault(cluster, []).append(a - b)
    signs = [s for s in (np.sign(np.mean(values)) for values in by_cluster.values()) if s]
    return float(binomtest(signs.count(1), len(signs)).pvalue) if signs else None
