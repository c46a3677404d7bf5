"""Thousands of critiques in one `collect` against a running server: does memory grow, does a connection leak?

Everything is as in a long `emoloop collect --lvlm vllm`: the runs, their log and pictures, the critic, the client
and its pool. The generator is the settings' own, at few steps, because its pictures are not what is looked at.

    python tests/faults/soak.py [CRITIQUES]      # against the server of the settings; 10,000 by default
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from emoloop.domain import UserError
from emoloop.graph.collect import Outcome, collect
from emoloop.graph.loop import open_loop
from emoloop.settings import load_settings
from emoloop.tools.urls import public

#: Neutral prompts and targets that are gone through in turn.
PROMPTS = ("a dog by the sea", "a cat in a meadow", "a house", "a boat in the snow", "a tree in the city")
TARGETS = ((1.8, -1.0), (1.8, 1.5), (-1.5, 1.5), (-1.5, -1.0), (0.0, 2.0), (0.5, 0.0), (-2.0, 0.0))


def main(
    n: int = 10_000,
    warm_up: int = 500,
    concurrency: int = 16,
    rounds: int = 3,
    images: int = 8,
    steps: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Memory and connections over many critiques in one `collect`.

    Args:
        n: Critiques that count, at least.
        warm_up: Critiques before the first look at the memory, at least.
        concurrency: Runs at a time, and requests in flight.
        rounds: Rounds of each run; none stops early.
        images: Pictures, so critiques, in a round.
        steps: Denoising steps.
        seed: Of the runs.

    Returns:
        Growth is what the process holds more at the end than after the warm-up; `memory_peak_growth_mb` is the most
        it held more at the end of any run.

    Raises:
        UserError: No server, or a run that failed.
    """
    settings = load_settings(
        {
            "lvlm": {"engine": "vllm", "concurrency": concurrency},
            "generator": {"steps": steps},
            # A tolerance that no picture meets and patience to the end: every run makes all its critiques.
            "loop": {"rounds": rounds, "images": images, "tolerance": 0.0, "patience": rounds},
        }
    )
    process = psutil.Process()
    runs = math.ceil((n + warm_up) / (rounds * images))

    def look() -> tuple[float, int]:
        gc.collect()
        return process.memory_info().rss / 2**20, len(process.net_connections("tcp"))

    class Watch:
        """Looks at the process as runs end."""

        done = made = counted = 0
        first: tuple[float, int] | None = None
        peak = 0.0
        began = 0.0

        def __call__(self, outcome: Outcome) -> None:
            if outcome.error is not None:
                raise UserError(f"run {outcome.run_id} failed: {outcome.error}")
            self.done += 1
            self.made += outcome.images
            if self.first is None and self.made >= warm_up:
                self.first, self.began = look(), time.perf_counter()
            elif self.first is not None:
                self.counted += outcome.images
                self.peak = max(self.peak, process.memory_info().rss / 2**20)
            if self.done % max(1, runs // 20) == 0:
                print(f"{self.done} of {runs} runs, {self.made} critiques", file=sys.stderr, flush=True)

    watch = Watch()

    async def run(home: Path) -> dict[str, float]:
        source = home / "prompts.jsonl"
        asked = itertools.islice(itertools.cycle(itertools.product(PROMPTS, TARGETS)), runs)
        lines = [json.dumps({"prompt": p, "valence": v, "arousal": a}) for p, (v, a) in asked]
        source.write_text("\n".join(lines) + "\n")
        async with open_loop(settings, home=str(home)) as loop:
            failed = source.with_suffix(".failed")
            await collect(loop, source, failed, seed=seed, concurrency=concurrency, on_outcome=watch)
            seconds = time.perf_counter() - watch.began
            memory, connections = look()
            missing = sum(row.missing for row in loop.recorder.store.runs())
        memory_before, connections_before = watch.first or (math.nan, 0)
        return {
            "critiques": watch.counted,
            "memory_growth_mb": memory - memory_before,
            "memory_peak_growth_mb": watch.peak - memory_before,
            "connections": connections,
            "connections_growth": connections - connections_before,
            "connections_after_close": look()[1],
            "answered": 1 - missing / watch.made,
            "critiques_per_second": watch.counted / seconds,
        }

    with tempfile.TemporaryDirectory(prefix="emoloop-soak-") as folder:
        figures = asyncio.run(run(Path(folder)))
    described = public(settings.model_dump(mode="json", exclude={"home"}))
    return {"bench": "soak", "figures": figures, "n": n, "runs": runs, "seed": seed, "settings": described}


if __name__ == "__main__":
    print(json.dumps(main(int((sys.argv[1:] or ["10000"])[0])), indent=1))
