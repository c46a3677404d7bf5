"""What the log and a run so far say of prompts that were not painted yet.

A prompt is cheap to write and dear to paint: more are written than painted, and a model of what words did picks those
that are expected nearest to the target, as far as it can tell (`tools.words`). With a memory, runs before this one lend
it what they saw, and their rewrites that came near the same target serve as examples: then what a run does depends on
the log that it finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from ..domain import Critique, EmotionTarget
from ..tools.images.base import Generator
from ..tools.words import WordModel, expected_distance
from ..traces import experience
from ..traces.fold import Fold
from ..traces.store import TraceStore

#: Readings of other runs that the model is fitted to at most, and the words and word pairs that it knows then.
_READINGS, _WORDS = 2000, 500


class Knowledge:
    """Asks a log; shared by all runs of a loop.

    Args:
        store: The log to learn from; None leaves what a run sees itself.
        generator: Only what it painted counts.
    """

    def __init__(self, store: TraceStore | None, generator: Generator) -> None:
        self.store = store
        about = generator.describe()
        self._painter = {"model": str(about.get("model")), "adapter": about.get("adapter")}
        self._fitted = lru_cache(2)(self._fit)

    async def advice(
        self, fold: Fold, target: EmotionTarget, number: int, options: Mapping[str, Any], count: int
    ) -> dict[str, Any]:
        """What a `RewriteRequest` may carry of what is known: its `rank`, `spare` and `examples`.

        Args:
            fold: The run so far.
            target: The wanted emotion.
            number: The round.
            options: The run's: `oversample` and `memory` count here.
            count: Prompts that are painted.
        """
        assert fold.started is not None
        given: dict[str, Any] = {}
        most = options.get("memory", 0)
        if (times := options.get("oversample", 1)) > 1:
            read = [(it.made.prompt, it.critique) for it in fold.tried.values() if it.made]
            seen = [(prompt, it) for prompt, it in read if isinstance(it, Critique)]
            # Where there is nothing to fit to, scikit-learn stays unloaded: the first picture waits for this.
            model = (
                await asyncio.to_thread(self._model, fold.started.time if most else None)
                if seen or most
                else None
            )
            if model is not None and (model.words or seen):
                texts = [prompt for prompt, _ in seen]
                readings = np.array([(it.valence, it.arousal) for _, it in seen]).reshape(-1, 2)

                def rank(prompts: Sequence[str]) -> list[int]:
                    mean, deviation = model.predict(prompts, texts, readings)
                    return np.argsort(expected_distance(mean, deviation, target), kind="stable").tolist()

                given |= {"rank": rank, "spare": (times - 1) * count}
        if self.store and most and number == 0:
            asked = self.store, target, fold.started.time, most
            about = {"neutral": fold.started.prompt, **self._painter}
            given["examples"] = await asyncio.to_thread(experience.examples, *asked, **about)
        return given

    def _model(self, began: datetime | None) -> WordModel:
        if self.store is None or began is None:
            return WordModel()
        last = experience.cursor_at(self.store, began)
        # Fitted again when the log has grown by a tenth or so, and not for each run.
        return self._fitted(last - last % (1 << max(0, last.bit_length() - 4)))

    def _fit(self, upto: int) -> WordModel:
        assert self.store is not None
        read = experience.readings(self.store, upto, _READINGS, **self._painter)
        points = np.array([it[1:] for it in read]).reshape(-1, 2)
        return WordModel([it.prompt for it in read], points, words=_WORDS)
