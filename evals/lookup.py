"""What the log says without weights: its phrases as a table, and a reader of its wording that chooses edits.

A distilled adapter has to be better than the table and than the reader's choice, or it has learned no more than they
hold: neither makes a picture or calls a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..domain import Critique, EmotionTarget, UserError
from ..rl.data.phrasebook import Phrasebook, Tried, addition, every_addition
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
        for one in readings(settings):
            if added := addition(one.neutral, one.prompt):
                found[added].append((one.valence, one.arousal))
        if not found:
            raise UserError(
                f"arm lookup: no rewrite was read in the log of {settings.home}: `emoloop collect` makes one"
            )
        return cls(list(found), np.array([np.mean(read, axis=0) for read in found.values()]))

    def nearest(self, target: EmotionTarget) -> str:
        """The addition whose reading is nearest to a target, by |ΔV| + |ΔA| over the wanted axes."""
        wanted = np.array([np.nan if aim is None else aim for aim in target.point])
        return self.texts[int(np.nansum(np.abs(self.read - wanted), axis=1).argmin())]


class Planner:
    """Edits of a prompt, chosen by words: every addition of the log behind it, and the one that a regression of the
    critic's readings on prompts (`tools.words.WordModel`) surely expects nearest.

    Args:
        settings: Whose log.

    Raises:
        UserError: There is no log, or nothing in it that fits other prompts.
    """

    def __init__(self, settings: Settings) -> None:
        self._book: Phrasebook = every_addition(list(readings(settings)))

    def edit(self, prompt: str, target: EmotionTarget) -> str:
        """The prompt with the addition that is expected nearest."""
        wanted = np.array([[np.nan if aim is None else aim for aim in target.point]])
        misses = self._book.misses(self._book.expect([prompt]), wanted[:, None])
        return f"{prompt}{self._book.phrases[int(misses.argmin())]}"


def readings(settings: Settings) -> Iterator[Tried]:
    """Each picture of the log that was read: its prompts, and what the critic said.

    Raises:
        UserError: There is no log.
    """
    with open_store(settings, read_only=True) as store:
        for run in map(store.run, [row.run_id for row in store.runs()]):
            for one in (one for round in run.rounds for one in round.candidates):
                if isinstance(read := one.critique, Critique):
                    yield Tried(run.prompt, one.prompt, read.valence, read.arousal, read.alignment)
