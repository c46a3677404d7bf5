"""Workers over one queue: shared work, drain, giving back, cancelling, a pipe; and processes that are killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from emoloop.evals.bench import workers as bench
from emoloop.graph import worker as module
from emoloop.graph.collect import collect, fingerprint
from emoloop.graph.loop import Loop, open_loop
from emoloop.graph.worker import Worker
from emoloop.traces.queue import Control
from painter import Painter
from scripted import Scripted

ASKED = {"prompt": "a dog", "target": {"valence": 2.0, "arousal": -1.0}, "options": {}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "RENEW", 0.02)
    monkeypatch.setattr("emoloop.graph.collect.POLL", 0.01)


def make(tmp_path: Path, painter: Painter | None = None) -> Loop:
    return open_loop(
        generator=painter or Painter(delay=0.001),
        lvlm=Scripted(),
        home=str(tmp_path / "home"),
        loop={"rounds": 2, "images": 2},
    )


def enqueue(loop: Loop, count: int, **more) -> list[str]:
    names = [f"run-{number}" for number in range(count)]
    queue = loop.recorder.store.queue
    queue.add("run", {name: {**ASKED, "seed": place} for place, name in enumerate(names)}, **more)
    return names


def states(loop: Loop) -> list[str]:
    return sorted(item.state for item in loop.recorder.store.queue.items())


async def until(holds) -> None:
    for _ in itertools.count():
        if holds():
            return
        await asyncio.sleep(0.005)


async def test_two_workers_share_the_work_and_double_nothing(tmp_path):
    one, two = Painter(delay=0.001), Painter(delay=0.001)
    done: list[tuple[str, str | None]] = []
    async with make(tmp_path, one) as first, make(tmp_path, two) as second:
        names = enqueue(first, 8)
        workers = [
            Worker(
                loop, concurrency=2, until_empty=True, on_done=lambda it, error: done.append((it.id, error))
            )
            for loop in (first, second)
        ]
        await asyncio.gather(*(worker.work() for worker in workers))
        assert sorted(done) == [(name, None) for name in sorted(names)]
        assert states(first) == ["done"] * 8
        assert one.requests and two.requests
        assert {row.status for row in first.recorder.store.runs()} == {"completed"}
        keys = Counter(event.key for name in names for event in first.recorder.store.events(name))
        assert set(keys.values()) == {1}
        assert not first.recorder.store.queue.held()


async def test_it_drains_and_it_gives_back(tmp_path):
    painter = Painter(delay=0.02)
    async with make(tmp_path, painter) as loop:
        enqueue(loop, 6)
        worker = Worker(loop, concurrency=2)
        work = asyncio.create_task(worker.work())
        await until(lambda: painter.requests)
        worker.drain()
        await work
        drained = states(loop)
        assert set(drained) == {"done", "queued"} and 1 <= drained.count("done") <= 2
        stopped = asyncio.create_task(Worker(loop, concurrency=2).work())
        before = len(painter.requests)
        await until(lambda: len(painter.requests) > before)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        assert states(loop) == drained and not loop.recorder.store.queue.held()
    again = Painter()
    async with make(tmp_path, again) as loop:
        await Worker(loop, until_empty=True).work()
        assert states(loop) == ["done"] * 6
        # What had been painted and logged is not painted again.
        assert len(again.requests) + len(painter.requests) <= 6 * 4 + 4


async def test_a_cancelled_run_is_let_go(tmp_path):
    painter = Painter(delay=30)  # it is still at work when it is cancelled
    async with make(tmp_path, painter) as loop:
        [name] = enqueue(loop, 1)
        queue = loop.recorder.store.queue
        worker = Worker(loop)
        work = asyncio.create_task(worker.work())
        await until(lambda: painter.requests)
        assert queue.cancel([name]) == 1
        await until(lambda: not queue.held())
        assert states(loop) == ["cancelled"]
        painter.delay = 0
        queue.requeue([name])
        await until(lambda: states(loop) == ["done"])
        worker.drain()
        await work


async def test_models_are_not_taken_for_others(tmp_path):
    async with make(tmp_path) as loop:
        enqueue(loop, 1, needs="others")
        await Worker(loop, needs=fingerprint(loop, 0), until_empty=True).work()
        assert states(loop) == ["queued"]
        assert loop.recorder.store.queue.waiting() == {"others": 1}


async def test_a_collection_is_done_by_workers_elsewhere(tmp_path):
    source = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a dog", "valence": v} for v in (1, 2)] + [{"prompt": "a cat", "valence": 1}]
    source.write_text("\n".join(map(json.dumps, lines)))
    seen = []
    here, there = Painter(), Painter(fail=lambda number: OSError("no paint") if number < 99 else None)
    async with make(tmp_path, here) as loop, make(tmp_path, there) as other:
        worker = Worker(other, needs=fingerprint(other, 0))
        work = asyncio.create_task(worker.work())
        await collect(loop, source, tmp_path / "failed", concurrency=0, on_outcome=seen.append)
        assert [it.known for it in seen] == [False] * 3 and all(it.error for it in seen)
        there.fail = lambda number: None
        seen.clear()
        # Only what failed is tried again; a pause holds for every worker.
        loop.recorder.store.queue.steer(Control(paused=True))
        again = asyncio.create_task(
            collect(loop, source, tmp_path / "failed", concurrency=0, on_outcome=seen.append)
        )
        await until(lambda: states(loop) == ["queued"] * 3)
        loop.recorder.store.queue.steer(Control())
        await again
        assert [it.error for it in seen] == [None] * 3 and {it.images for it in seen} == {4}
        assert not here.requests
        worker.drain()
        await work


async def test_what_a_stopped_collection_queued_is_withdrawn(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "a dog", "valence": n / 10}) for n in range(9)))
    painter = Painter(delay=30)
    async with make(tmp_path, painter) as loop:
        task = asyncio.create_task(collect(loop, source, tmp_path / "failed", concurrency=2))
        await until(lambda: painter.requests and len(states(loop)) == 9)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert states(loop) == ["cancelled"] * 9
        painter.delay, seen = 0, []
        await collect(loop, source, tmp_path / "failed", on_outcome=seen.append)
        assert [it.error for it in seen] == [None] * 9 and states(loop) == ["done"] * 9


async def test_a_pipe_is_worked_on_while_it_is_open(tmp_path):
    pipe, seen, first = tmp_path / "pipe", [], threading.Event()
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("w") as file:
            print(json.dumps({"prompt": "a dog", "valence": 1}), file=file, flush=True)
            assert first.wait(60)
            print(json.dumps({"prompt": "a cat", "valence": 1}), "no json", sep="\n", file=file)

    thread = threading.Thread(target=write)
    thread.start()

    def note(outcome) -> None:
        seen.append(outcome)
        first.set()

    async with make(tmp_path) as loop:
        await collect(loop, pipe, tmp_path / "failed", on_outcome=note)
    thread.join()
    assert sorted((it.line, it.error is None) for it in seen) == [(1, True), (2, True), (3, False)]


@pytest.mark.slow
def test_killed_workers_lose_and_double_nothing():
    document = bench.main(
        runs=24, workers=2, concurrency=4, kill_seconds=3.0, rounds=2, images=2, batch_seconds=0.2
    )
    figures = document["figures"]
    assert figures["completed"] == 24 and figures["killed"] >= 1
    assert {figures[name] for name in ("lost", "doubled", "different")} == {0}
