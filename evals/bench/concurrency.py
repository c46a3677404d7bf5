"""Many runs at a time on models of fixed speed: how near comes the loop to what the models alone would take?"""

from __future__ import annotations

import asyncio
import tempfile
import time
from typing import Any

from ...domain import RunStatus
from ...graph.loop import open_loop
from ...settings import load_settings
from .fakes import FakeGenerator, FakeLVLM


def main(
    runs: int = 64,
    rounds: int = 3,
    images: int = 8,
    batch_seconds: float = 0.05,
    answer_seconds: float = 0.08,
    slots: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Wall time of many runs beside the time that their busiest resource needs at least.

    Args:
        runs: Runs, all at once.
        rounds: Rounds of each.
        images: Pictures in a round, and in a batch of the generator.
        batch_seconds: What the generator takes for a batch, one after the other.
        answer_seconds: What the LVLM takes for an answer.
        slots: Answers that the LVLM gives at a time.
        seed: Of the first run.
    """
    optimum = max(
        runs * rounds * batch_seconds, (runs * (rounds * (images + 1) - 1)) * answer_seconds / slots
    )
    options = {"rounds": rounds, "images": images, "patience": rounds, "tolerance": 0.0}
    base = load_settings({"loop": options, "lvlm": {"concurrency": slots}})

    async def measure(home: str) -> float:
        generator, lvlm = FakeGenerator(batch_seconds, images), FakeLVLM(seconds=answer_seconds)
        async with open_loop(base, generator=generator, lvlm=lvlm, home=home) as loop:
            began = time.perf_counter()
            request = ("a dog by the sea", {"valence": 2.0, "arousal": -1.0})
            results = await asyncio.gather(
                *(loop.run(*request, seed=seed + number) for number in range(runs))
            )
            assert all(it.status is RunStatus.COMPLETED and len(it.rounds) == rounds for it in results)
            return time.perf_counter() - began

    with tempfile.TemporaryDirectory(prefix="emoloop-concurrency-") as home:
        cpu = time.process_time()
        seconds = asyncio.run(measure(home))
        cpu = time.process_time() - cpu
    figures = {
        "optimum_ratio": seconds / optimum,
        "seconds": seconds,
        "optimum_seconds": optimum,
        "cpu_seconds": cpu,
    }
    return {"figures": figures, "n": runs}
