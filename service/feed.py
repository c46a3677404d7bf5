"""Committed events for many watchers: each event once, in the order of the log, whoever wrote it.

One task reads the log's end and hands it to all, so that two hundred watchers cost one query. A watcher that falls
behind keeps nothing in memory: it reads the log again from the last event it saw.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from sqlalchemy import func, select

from ..events import Event
from ..traces.schema import events as log
from ..traces.store import TraceStore

#: Seconds between two looks at what other processes wrote; commits of this one are told at once.
_POLL = 0.5

#: Seconds that commits are gathered.
_GATHER = 0.03

#: Events that wait for a slow watcher, and that are read at once.
_WAITING = 1000


class _Watcher:
    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id
        self.events: list[Event] = []
        self.behind = True
        self.news = asyncio.Event()

    def offer(self, events: Sequence[Event]) -> None:
        if mine := [event for event in events if self.run_id in (None, event.run_id)]:
            if len(self.events) + len(mine) > _WAITING:
                self.behind = True
            else:
                self.events += mine
            self.news.set()


class Feed:
    """Follows a log; to be entered.

    Attributes:
        cursor: Of the last event that was told.

    Args:
        store: The log.
    """

    def __init__(self, store: TraceStore) -> None:
        self.cursor = 0
        self._store = store
        self._watchers: set[_Watcher] = set()
        self._news = asyncio.Event()
        self._stores: list[TraceStore] = []

    async def __aenter__(self) -> Feed:
        self._loop = asyncio.get_running_loop()
        self.cursor = await asyncio.to_thread(self._last)
        self.listen(self._store)
        self._task = asyncio.create_task(self._pump())
        return self

    async def __aexit__(self, *_: object) -> None:
        for store in self._stores:
            store.subscribers.remove(self._told)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def listen(self, store: TraceStore) -> None:
        """Hear at once of what a store of this process commits."""
        store.subscribers.append(self._told)
        self._stores.append(store)

    def nudge(self, run_id: str) -> None:
        """Wake who watches a run although nothing was committed: how it stands has changed."""
        for watcher in self._watchers:
            if watcher.run_id in (None, run_id):
                watcher.news.set()

    async def follow(self, after: int, run_id: str | None = None) -> AsyncGenerator[list[Event]]:
        """Events after a cursor, those of before first; without end.

        Args:
            after: The last cursor that was seen.
            run_id: Only of this run.

        Yields:
            One or more events in order; none where `nudge` said that something else has changed.
        """
        watcher = _Watcher(run_id)
        self._watchers.add(watcher)
        try:
            while True:
                if watcher.behind:
                    watcher.behind, watcher.events = False, []
                    events = await asyncio.to_thread(self._read, after, run_id)
                    # A full page may have more behind it.
                    watcher.behind |= len(events) == _WAITING
                    if not events:
                        continue
                else:
                    await watcher.news.wait()
                    watcher.news.clear()
                    if watcher.behind:
                        continue
                    events, watcher.events = watcher.events, []
                fresh = [event for event in events if event.cursor > after]
                after = fresh[-1].cursor if fresh else after
                yield fresh
        finally:
            self._watchers.discard(watcher)

    def _last(self) -> int:
        with self._store.read() as connection:
            return connection.scalar(select(func.max(log.c.cursor))) or 0

    def _read(self, after: int, run_id: str | None) -> list[Event]:
        if run_id is None:
            return self._store.tail(after, _WAITING)
        return self._store.events(run_id, after)[:_WAITING]

    def _told(self, events: Sequence[Event]) -> None:
        self._loop.call_soon_threadsafe(self._news.set)

    async def _pump(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL if self._watchers else None):
                    await self._news.wait()
            except TimeoutError:
                pass
            # What is committed in the same moment is told together.
            await asyncio.sleep(_GATHER)
            self._news.clear()
            while events := await asyncio.to_thread(self._store.tail, self.cursor, _WAITING):
                self.cursor = events[-1].cursor
                for watcher in self._watchers:
                    watcher.offer(events)
