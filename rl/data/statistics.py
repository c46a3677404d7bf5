"""What a log holds for training; `emoloop distill --dry-run` prints it."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel


class Histogram(BaseModel):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray, low: float, high: float, bins: int) -> Histogram:
        """Values beyond the ends count in the outermost bins; NaN counts nowhere."""
        counts, edges = np.histogram(np.clip(values[~np.isnan(values)], low, high), bins, (low, high))
        return cls(edges=[round(float(edge), 4) for edge in edges], counts=[int(count) for count in counts])


class Statistics(BaseModel):
    """What the log holds.

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
