"""One thread that runs everybody's jobs in batches.

Models want batches, concurrent runs bring single jobs. Jobs wait a few milliseconds for company, then go
together through one thread: the event loop stays free and the model never sees two callers at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False)
class _Job(Generic[T, R]):
    item: T
    key: Hashable
    future: Future[R] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class BatchWorker(Generic[T, R]):
    """Runs submitted items in batches of at most `size` on one thread, first come first served.

    Attributes:
        size: The largest batch; may be changed at any time.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | Exception]],
        *,
        size: int,
        window: float,
        key: Callable[[T], Hashable] = lambda item: None,
        name: str = "emoloop-batches",
    ) -> None:
        """Prepare the worker; its thread starts with the first job.

        Args:
            run: Takes the items of one batch, returns for each its result or the exception that concerns
                it alone. An exception that `run` raises goes to every item of the batch.
            size: The largest batch.
            window: Seconds that a job waits for company, counted from its submission.
            key: Only items with the same key share a batch.
            name: Name of the thread.
        """
        self._run, self.size, self._window, self._key, self._name = run, size, window, key, name
        self._queue: list[_Job[T, R]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, items: Sequence[T]) -> list[Future[R]]:
        """Queue items together, so that they share batches.

        Returns:
            One future per item. Cancelling it takes the item out of the queue unless it is running already.

        Raises:
            RuntimeError: The worker is closed.
        """
        jobs = [_Job[T, R](item, self._key(item)) for item in items]
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._queue.extend(jobs)
            self._changed.notify_all()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Cancel what is queued and wait for the batch that is running."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _take(self) -> list[_Job[T, R]] | None:
        with self._changed:
            while not self._closed:
                left = None
                if self._queue:
                    head = self._queue[0]
                    batch = [job for job in self._queue if job.key == head.key][: self.size]
                    left = head.since + self._window - time.monotonic()
                    if left <= 0 or len(batch) >= self.size:
                        self._queue = [job for job in self._queue if job not in batch]
                        return batch
                self._changed.wait(left)
            for job in self._queue:
                job.future.cancel()
            self._queue.clear()
            return None

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not live:
                continue
            results: Sequence[R | Exception]
            try:
                results = self._run([job.item for job in live])
            except Exception as error:
                results = [error] * len(live)
            for job, result in zip(live, results, strict=True):
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result)
