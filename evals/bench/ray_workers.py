"""Runs by actors of a Ray cluster, one of which is killed: how much faster are several, and do they say the same?"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from ...graph.ray_workers import Actor, start_ray
from ...traces.store import TraceStore
from .postgres import postgres, wanted
from .workers import enqueue, essence, open_fakes, open_log, work_alone


def main(
    runs: int = 200,
    actors: int = 2,
    concurrency: int = 8,
    rounds: int = 3,
    images: int = 4,
    batch_seconds: float = 0.1,
    answer_seconds: float = 0.1,
    kill: bool = True,
    database: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Speed of several actors over that of one, and whether their logs equal that of one process without Ray.

    Args:
        runs: Of each collection.
        actors: Compared with one.
        concurrency: Runs at a time in each.
        rounds: Rounds of each run.
        images: Pictures in a round, and in a batch of an actor's generator.
        batch_seconds: What a generator takes for a batch, one after the other.
        answer_seconds: What the LVLM takes for an answer.
        kill: Do the runs once more, and kill an actor when a third of them is done.
        database: `postgres` (one of its own), `sqlite`, or `auto`: postgres where its programs are.
        seed: Of the runs.
    """
    about = {
        "loop": {"rounds": rounds, "images": images, "patience": rounds, "tolerance": 0.0},
        "batch_seconds": batch_seconds,
        "answer_seconds": answer_seconds,
        "concurrency": concurrency,
        "url": None,
    }
    server = wanted(database)
    start_ray()
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emoloop-ray-")))
        alone = {**about, "home": str(folder / "alone")}
        with open_log(alone) as store:
            enqueue(store, runs, seed)
            asyncio.run(work_alone({**alone, "until_empty": True}))
            expected = essence(store)
        seconds: dict[str, float] = {}
        for name, many, killing in (("one", 1, False), ("several", actors, False), ("killed", actors, kill)):
            if name == "killed" and not kill:
                continue
            url = stack.enter_context(postgres()) if server else None
            shared = {**about, "home": str(folder / name), "url": url, "notes": str(folder / f"{name}.txt")}
            with open_log(shared) as store:
                enqueue(store, runs, seed)
                seconds[name] = _work(store, shared, many, runs // 3 if killing else None)
                figures[f"different_{name}"] = sum(essence(store).get(it) != expected[it] for it in expected)
            made = Counter(Path(shared["notes"]).read_text().split())
            figures[f"repeated_{name}"] = made.total() - len(made)
    figures["speedup"] = seconds["one"] / seconds["several"]
    figures["equal"] = float(not any(figures[it] for it in figures if it.startswith("different")))
    figures |= {f"seconds_{name}": it for name, it in seconds.items()}
    return {"figures": figures, "n": runs, "database": "postgresql" if server else "sqlite"}


def _work(store: TraceStore, about: dict[str, Any], many: int, kill_at: int | None) -> float:
    """Have actors empty the queue; kill one on the way. Seconds from the first run on, with all models open."""
    import ray

    actor: Any = ray.remote(Actor).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    crew = [actor.remote(partial(open_fakes, about), about["concurrency"]) for _ in range(many)]
    ray.get([it.prints.remote(0) for it in crew])
    began = time.perf_counter()
    work = [it.work.remote(None, None) for it in crew]
    while (done := store.queue.counts()["run"])["queued"] + done["running"]:
        time.sleep(0.1)
        if kill_at is not None and done["done"] >= kill_at:
            ray.kill(crew[0], no_restart=False)
            kill_at = None
        ended, _ = ray.wait(work, timeout=0)
        ray.get(ended)  # an actor ends before its time only with an error
    seconds = time.perf_counter() - began
    ray.get([it.drain.remote() for it in crew])
    ray.get(work)
    return seconds
