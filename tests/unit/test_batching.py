import asyncio
import threading

import pytest
from emoloop.tools.images.batching import BatchWorker


class Recorder:
    """Runs batches of numbers, notes them, can be held back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.started = threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.started.set()
        self.gate.wait(10)
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        return [ValueError(f"bad {x}") if x < 0 else x * 10 for x in items]


@pytest.fixture
def run() -> Recorder:
    return Recorder()


async def test_jobs_of_many_callers_share_batches_on_one_thread(run: Recorder):
    worker = BatchWorker(run, size=4, window=0.05)

    async def one(x: int) -> int:
        return await asyncio.wrap_future(worker.submit([x])[0])

    assert await asyncio.gather(*map(one, range(10))) == [x * 10 for x in range(10)]
    assert run.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(run.threads) == 1
    assert threading.get_ident() not in run.threads
    await asyncio.to_thread(worker.close)


async def test_only_items_of_one_key_share_a_batch(run: Recorder):
    worker = BatchWorker(run, size=4, window=0.0, key=lambda x: x % 2)
    run.gate.clear()
    first = worker.submit([0])
    run.started.wait(10)
    rest = worker.submit([1, 2, 3, 4])
    run.gate.set()
    assert await asyncio.gather(*map(asyncio.wrap_future, [*first, *rest])) == [0, 10, 20, 30, 40]
    assert run.batches == [[0], [1, 3], [2, 4]]
    worker.close()


async def test_an_error_reaches_only_its_own_job(run: Recorder):
    worker = BatchWorker(run, size=4, window=0.0)
    done = await asyncio.gather(*map(asyncio.wrap_future, worker.submit([1, -2, 3])), return_exceptions=True)
    assert done[0] == 10
    assert isinstance(done[1], ValueError)
    assert done[2] == 30
    worker.close()


async def test_an_error_of_the_run_reaches_its_batch_and_the_worker_lives_on():
    def run(items: list[int]) -> list[int]:
        if 13 in items:
            raise RuntimeError("no")
        return items

    worker = BatchWorker(run, size=2, window=0.0)
    done = await asyncio.gather(*map(asyncio.wrap_future, worker.submit([13, 1])), return_exceptions=True)
    assert all(isinstance(result, RuntimeError) for result in done)
    assert await asyncio.wrap_future(worker.submit([7])[0]) == 7
    worker.close()


async def test_cancelled_jobs_leave_the_queue(run: Recorder):
    worker = BatchWorker(run, size=2, window=0.0)
    run.gate.clear()
    first = asyncio.wrap_future(worker.submit([1])[0])
    run.started.wait(10)
    waiting = [asyncio.wrap_future(f) for f in worker.submit([2, 3])]
    waiting[0].cancel()
    await asyncio.sleep(0)
    run.gate.set()
    assert await first == 10
    assert await waiting[1] == 30
    assert run.batches == [[1], [3]]
    worker.close()


def test_closing_cancels_what_waits_and_refuses_more(run: Recorder):
    worker = BatchWorker(run, size=1, window=0.0)
    run.gate.clear()
    running, waiting = worker.submit([1, 2])
    run.started.wait(10)
    threading.Timer(0.1, run.gate.set).start()
    worker.close()
    assert running.result() == 10
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit([3])
