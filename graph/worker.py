"""A worker: takes runs from the queue and drives them, as many at a time as it may.

Any number of workers, on any machines that reach the log, share one queue. What a run does lies in the log, so a
worker that is killed costs nothing but its lease: the next one goes on from the run's last event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ..agents.ask import one_line
from ..domain import RunStatus, UserError
from ..traces.database import StoreError
from ..traces.queue import RENEW, Item, owner_name
from .loop import Loop

T = TypeVar("T")

#: Seconds between two looks at an empty queue.
POLL = 1.0


class Worker:
    """Takes runs while it is told to.

    Args:
        loop: An open loop, whose models drive the runs.
        concurrency: Runs at a time; they share the models, and their requests share batches.
        needs: What runs may need of the models (`collect.fingerprint`).
        batch: Only runs of this batch; by default of any.
        until_empty: Drain when nothing waits.
        on_done: Called with each run that ended here, and why it failed.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        concurrency: int = 8,
        needs: str | None = None,
        batch: str | None = None,
        until_empty: bool = False,
        on_done: Callable[[Item, str | None], object] = lambda item, error: None,
    ) -> None:
        self._loop, self._concurrency, self._on_done = loop, concurrency, on_done
        self._queue = loop.recorder.store.queue
        self._owner = owner_name()
        self._take = partial(self._queue.take, self._owner, needs=needs, batch=batch)
        self._work: dict[str, asyncio.Task[str | None]] = {}
        self._door = asyncio.Lock()
        self._news = asyncio.Event()
        self._drained, self._until_empty = False, until_empty

    def drain(self) -> None:
        """Take no more; `work` returns when what is under way is done."""
        self._drained = True
        self._news.set()

    def nudge(self) -> None:
        """Look into the queue now."""
        self._news.set()

    async def work(self) -> None:
        """Take runs and drive them until `drain` is called.

        Cancelled, it gives back what it has; another worker goes on with that.

        Raises:
            StoreError: The log is lost; all runs stop.
        """
        slots = [asyncio.create_task(self._slot()) for _ in range(self._concurrency)]
        renewing = asyncio.create_task(self._renew())
        try:
            await asyncio.gather(*slots)
        finally:
            for task in (*slots, renewing):
                task.cancel()
            await asyncio.gather(*slots, renewing, return_exceptions=True)
            with suppress(StoreError):
                await _whole(self._queue.give_back, self._owner)

    async def _slot(self) -> None:
        while (item := await self._next()) is not None:
            work = self._work[item.id] = asyncio.create_task(self._drive(item))
            try:
                await asyncio.wait([work])
            finally:
                del self._work[item.id]
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            if work.cancelled():  # the run is no more ours: it was cancelled, or taken over
                await _whole(self._queue.settle, item.id, self._owner, "queued")
                continue
            error = work.result()
            await _whole(self._queue.settle, item.id, self._owner, "failed" if error else "done", error)
            self._on_done(item, error)

    async def _next(self) -> Item | None:
        # One slot asks at a time, so that an idle worker asks once a second however many slots it has.
        async with self._door:
            while not self._drained:
                item = await _whole(self._take)
                if item is not None:
                    return item
                if self._until_empty and not self._work:
                    self.drain()
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._news.wait()
                self._news.clear()
                await _whole(self._queue.reap)
        return None

    async def _drive(self, item: Item) -> str | None:
        """Drive a run to its end; say why there is no complete one."""
        asked: dict[str, Any] = item.payload
        self._loop.recorder.taken[item.id] = self._owner
        try:
            result = await self._loop.run(
                asked["prompt"],
                asked["target"],
                seed=asked["seed"],
                run_id=item.id,
                review=False,  # nobody is there to answer
                **asked["options"],
            )
            # The log has everything; a saved state of each run would only fill the disk.
            await self._loop.forget(item.id)
        except StoreError:
            raise
        except UserError as error:
            return str(error)
        except Exception as error:
            return one_line(error)
        finally:
            self._loop.recorder.taken.pop(item.id, None)
        if result.status is RunStatus.COMPLETED:
            return None
        return result.warnings[-1] if result.warnings else f"{result.status.value}: {result.stop_reason}"

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW)
            with suppress(
                StoreError
            ):  # a lease outlives a lost connection, and without a log the runs end anyway
                work = dict(self._work)  # what is taken meanwhile is not in the answer
                ours = await _whole(self._queue.renew, self._owner)
                for id in work.keys() - ours:
                    work[id].cancel()
                await _whole(self._queue.reap)


async def _whole(call: Callable[..., T], *arguments: Any) -> T:
    """Call in a thread. What was begun is waited for, even by who is cancelled: what was taken must be known."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
