"""Runs from one queue by several worker processes, one of which is killed now and then: is all done, and once?"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ...domain import RunStatus
from ...events import ImageGenerated, RunStarted
from ...graph.loop import Loop, open_loop
from ...graph.worker import Worker
from ...settings import load_settings
from ...traces.queue import owner_name
from ...traces.recorder import open_recorder
from ...traces.store import TraceStore, open_store
from .fakes import FakeGenerator, FakeLVLM
from .postgres import postgres, wanted

_NO_DBOS = (
    "dbos_cost_ratio is missing: python -m venv dbos && dbos/bin/pip install dbos 'psycopg[binary]', then "
    "dbos_python=dbos/bin/python (and a PostgreSQL)"
)


def main(
    runs: int = 200,
    workers: int = 4,
    concurrency: int = 8,
    kill_seconds: float = 10.0,
    rounds: int = 3,
    images: int = 4,
    batch_seconds: float = 0.1,
    answer_seconds: float = 0.1,
    database: str = "auto",
    compare: bool = True,
    dbos_python: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Completed, lost and doubled runs and events under kill -9, and what differs from one process's results.

    Args:
        runs: Queued at the beginning.
        workers: Processes; a killed one is replaced.
        concurrency: Runs at a time in each.
        kill_seconds: Seconds between two kills.
        rounds: Rounds of each run.
        images: Pictures in a round, and in a batch of a worker's generator.
        batch_seconds: What a generator takes for a batch, one after the other.
        answer_seconds: What the LVLM takes for an answer.
        database: `postgres` (one of its own), `sqlite`, or `auto`: postgres where its programs are.
        compare: Do the same runs in one undisturbed process as well.
        dbos_python: The interpreter of an environment with DBOS, the baseline of `dbos_cost_ratio`: the CPU time of
            this process for a durable step of a queued run, over that of DBOS for the same on the same server.
        seed: Of the runs and of who is killed.
    """
    server = wanted(database)
    options = {
        "loop": {"rounds": rounds, "images": images, "patience": rounds, "tolerance": 0.0},
        "batch_seconds": batch_seconds,
        "answer_seconds": answer_seconds,
        "concurrency": concurrency,
    }
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emoloop-workers-")))
        url = stack.enter_context(postgres()) if server else None
        shared = {**options, "home": str(folder / "shared"), "url": url}
        with open_log(shared) as store:
            enqueue(store, runs, seed)
            began = time.perf_counter()
            figures["killed"] = _work(store, shared, workers, kill_seconds, random.Random(seed))
            figures["seconds"] = time.perf_counter() - began
            told = essence(store)
            completed = [it for it in store.runs() if it.status is RunStatus.COMPLETED]
            for item in store.queue.items():
                if item.error:
                    print(f"{item.id}: {item.error}", file=sys.stderr)
            events = [event for row in store.runs() for event in store.events(row.run_id)]
        keys, times = Counter(event.key for event in events), [event.time for event in events]
        figures["completed"] = len(completed)
        # What the generators need at least, if all are busy from the first event to the last.
        optimum = runs * rounds * batch_seconds / workers
        figures["optimum_ratio"] = (max(times) - min(times)).total_seconds() / optimum
        figures["lost"] = runs - figures["completed"]
        figures["doubled"] = keys.total() - len(keys)
        if compare:
            alone = {**options, "home": str(folder / "alone"), "url": None, "until_empty": True}
            with open_log(alone) as store:
                enqueue(store, runs, seed)
                asyncio.run(work_alone(alone))
                expected = essence(store)
            figures["different"] = sum(told.get(name) != expected[name] for name in expected)
    if server and dbos_python:
        figures |= steps(dbos_python, runs, 20, concurrency)
    else:
        print(_NO_DBOS, file=sys.stderr)
    return {"figures": figures, "n": runs, "database": "postgresql" if server else "sqlite"}


def steps(dbos_python: str, runs: int, steps: int, concurrency: int) -> dict[str, float]:
    """CPU milliseconds for a durable step, ours and DBOS's, each on a server of its own."""
    image: Any = {"round": 0, "sha256": f"{0:064x}", "prompt": "a dog", "seed": 1, "model": "fake"}

    def event(run_id: str, number: int) -> ImageGenerated:
        return ImageGenerated(run_id=run_id, index=number, height=96, width=96, **image)

    async def ours(url: str, home: str) -> float:
        settings = load_settings({"home": home, "traces": {"database_url": url}})
        async with open_recorder(settings) as recorder:
            queue, owner = recorder.store.queue, owner_name()

            async def slot() -> None:
                while (item := await asyncio.to_thread(queue.take, owner)) is not None:
                    await recorder.record(RunStarted(run_id=item.id, **item.payload))
                    for number in range(steps):
                        await recorder.record(event(item.id, number))
                    await asyncio.to_thread(queue.settle, item.id, owner, "done")

            began = time.process_time()
            asked = {"prompt": "a dog", "target": {"valence": 2.0}, "seed": 1}
            queue.add("run", {f"run-{number}": asked for number in range(runs)})
            await asyncio.gather(*(slot() for _ in range(concurrency)))
            return 1000 * (time.process_time() - began) / (runs * steps)

    with postgres() as url, tempfile.TemporaryDirectory(prefix="emoloop-steps-") as home:
        mine = asyncio.run(ours(url, home))
    with postgres() as url:
        script = str(Path(__file__).with_name("dbos_steps.py"))
        counts = map(str, (runs, steps, concurrency))
        body = event("run-0", 0).model_dump_json()
        said = subprocess.run([dbos_python, script, url, *counts, body], stdout=subprocess.PIPE, check=True)
    theirs = float(said.stdout.split()[-1])
    return {"cpu_ms_per_step": mine, "cpu_ms_per_step_dbos": theirs, "dbos_cost_ratio": mine / theirs}


def open_log(about: dict[str, Any]) -> TraceStore:
    """The log that `about` names."""
    return open_store(load_settings({"home": about["home"], "traces": {"database_url": about["url"]}}))


def enqueue(store: TraceStore, runs: int, seed: int, **more: Any) -> None:
    """Queue so many runs that differ in their seeds."""
    asked = {"prompt": "a dog by the sea", "target": {"valence": 2.0, "arousal": -1.0}, "options": {}}
    entries = {f"run-{number:05}": {**asked, "seed": seed + number} for number in range(runs)}
    store.queue.add("run", entries, **more)


def essence(store: TraceStore) -> dict[str, Any]:
    """What logs of the same requests have in common: each run's events by their keys; times and order are their own."""
    return {
        row.run_id: {
            it.key: it.model_dump(exclude={"seq", "time", "seconds"}) for it in store.events(row.run_id)
        }
        for row in store.runs()
    }


def _work(
    store: TraceStore, about: dict[str, Any], workers: int, kill_seconds: float, dice: random.Random
) -> int:
    """Have workers empty the queue; kill one now and then. How many were killed."""
    killed, children = 0, [_start(about) for _ in range(workers)]
    following = time.monotonic() + kill_seconds
    try:
        while _left(store):
            time.sleep(0.2)
            if time.monotonic() < following:
                continue
            following = time.monotonic() + kill_seconds
            # Who holds nothing (yet) loses nothing.
            busy = {int(owner.split(":")[-2]) for owner in store.queue.held().values()}
            chosen = [place for place, child in enumerate(children) if child.pid in busy]
            if chosen:
                place = dice.choice(chosen)
                children[place].kill()
                children[place].wait()
                children[place] = _start(about)
                killed += 1
                print(f"killed {killed}, {_left(store)} runs left", file=sys.stderr, flush=True)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
    return killed


def _left(store: TraceStore) -> int:
    counts = store.queue.counts()["run"]
    return counts["queued"] + counts["running"]


def _start(about: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", __name__, json.dumps(about)])


def open_fakes(about: dict[str, Any]) -> Loop:
    """A loop on models of fixed speed, as `about` says."""
    generator = FakeGenerator(about["batch_seconds"], about["loop"]["images"], about.get("notes"))
    settings = load_settings({"loop": about["loop"], "traces": {"database_url": about["url"]}})
    lvlm = FakeLVLM(seconds=about["answer_seconds"])
    return open_loop(settings, generator=generator, lvlm=lvlm, home=about["home"])


async def work_alone(about: dict[str, Any]) -> None:
    """A worker; SIGTERM drains it."""
    async with open_fakes(about) as loop:
        until_empty = about.get("until_empty", False)
        worker = Worker(loop, concurrency=about["concurrency"], until_empty=until_empty)
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.drain)
        await worker.work()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asyncio.run(work_alone(json.loads(sys.argv[1])))
