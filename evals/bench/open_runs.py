"""Thousands of runs open at a time, each waiting for its critic: what does one more take of memory?"""

from __future__ import annotations

import asyncio
import resource
import sys
import tempfile
from typing import Any

from ...graph.loop import open_loop
from ...graph.worker import Worker
from ...settings import load_settings
from .fakes import FakeGenerator, FakeLVLM
from .workers import enqueue


class _Silent(FakeLVLM):
    """Answers nobody before `wanted` have asked."""

    wanted: int
    waiting: int = 0
    all_there: Any = None

    async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
        self.waiting += 1
        if self.waiting == self.wanted:
            self.all_there.set()
        await self.all_there.wait()
        return await super()._agenerate(*args, **kwargs)


async def main(runs: int = 5000, finish: bool = False) -> dict[str, Any]:
    """The most memory that the process had when all runs were open, and what of it is one run's.

    Args:
        runs: Open at a time, of one picture each.
        finish: Let the critic answer then, and see all of them end.
    """
    lvlm = _Silent(wanted=runs, all_there=asyncio.Event())
    base = load_settings({"loop": {"rounds": 1, "images": 1}, "lvlm": {"concurrency": runs}})
    with tempfile.TemporaryDirectory(prefix="emoloop-open-") as home:
        async with open_loop(base, generator=FakeGenerator(), lvlm=lvlm, home=home) as loop:
            enqueue(loop.recorder.store, runs, 0)
            before = _peak_mb()
            work = asyncio.create_task(Worker(loop, concurrency=runs, until_empty=True).work())
            there = asyncio.create_task(lvlm.all_there.wait())
            await asyncio.wait({work, there}, return_when=asyncio.FIRST_COMPLETED)
            mb = _peak_mb()
            if not finish:
                work.cancel()
            await asyncio.gather(work, return_exceptions=not finish)
            done = loop.recorder.store.queue.counts()["run"]["done"]
    figures = {"open": lvlm.waiting, "mb": mb, "kb_per_run": 1024 * (mb - before) / runs, "completed": done}
    return {"figures": figures, "n": runs}


def _peak_mb() -> float:
    # macOS counts bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
