"""The log as a table of phrases: what its rewrites added to their neutral prompts, and how that was read.

A distilled adapter has to be better than this table, or it has learned the table alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..domain import Critique, EmotionTarget, UserError
from ..rl.data.phrasebook import addition
from ..settings import Settings
from ..traces.store import open_store


@dataclass(frozen=True)
class Phrases:
    """Additions of a log.

    Attributes:
        texts: K additions, with what joins them to a prompt.
        read: (K, 2) mean valence and arousal that the critic read behind each.
    """

    texts: list[str]
    read: NDArray[np.float64]

    @classmethod
    def of_log(cls, settings: Settings) -> Phrases:
        """All additions in the log of `settings.home`.

        Raises:
            UserError: There is no log, or no rewrite in it that begins with its neutral prompt and was read.
        """
        found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        with open_store(settings, read_only=True) as store:
            for run in map(store.run, [row.run_id for row in store.runs()]):
                for one in (one for round in run.rounds for one in round.candidates):
                    added = addition(run.prompt, one.prompt)
                    if added and isinstance(one.critique, Critique):
                        found[added].append((one.critique.valence, one.critique.arousal))
        if not found:
            raise UserError(
                f"arm lookup: no rewrite was read in the log of {settings.home}: `emoloop collect` makes one"
            )
        return cls(list(found), np.array([np.mean(read, axis=0) for read in found.values()]))

    def nearest(self, target: EmotionTarget) -> str:
        """The addition whose reading is nearest to a target, by |ΔV| + |ΔA| over the wanted axes."""
        wanted = np.array([np.nan if aim is None else aim for aim in target.point])
        return self.texts[int(np.nansum(np.abs(self.read - wanted), axis=1).argmin())]
