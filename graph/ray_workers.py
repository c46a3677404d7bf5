"""Workers as Ray actors: each opens its models once and takes runs from the queue, as `emoloop worker` does.

The queue decides who does what, and how many actors there are; Ray places them, brings machines where it can, and
starts a killed one again. What that did lies in the log, so it costs the rounds that were open.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..agents.ask import one_line
from ..domain import Failure, UserError
from ..settings import Settings
from ..traces.store import TraceStore, open_store
from .collect import Outcome, collect_by, fingerprint
from .loop import Loop, open_loop
from .worker import POLL, Worker

T = TypeVar("T")

#: Seconds after which an actor goes that nothing waits for, and that one has which never got a place when all is done.
_SPARE, _GRACE = 60.0, 30.0


def start_ray() -> Any:
    """Ray, connected to the cluster that RAY_ADDRESS names, else to one of this machine.

    It prints what it has to say: who keeps stdout for a document redirects it.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError('--engine ray needs Ray: pip install "emoloop[ray]"') from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray


def needed(settings: Settings) -> dict[str, Any]:
    """Ray's options for who holds the models; a GPU each where the cluster has any."""
    import ray

    own = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
    return {"num_cpus": 1, **own, **settings.ray.options}


class Actor:
    """A worker in a process that Ray has placed; its loop is opened once, for all the runs it does.

    Args:
        make: Makes the loop, where the actor is.
        concurrency: Runs at a time.
    """

    def __init__(self, make: Callable[[], Loop], concurrency: int) -> None:
        self._make, self._concurrency = make, concurrency
        self._door, self._loop = asyncio.Lock(), None
        self._worker, self._drained = None, False

    async def _open(self) -> Loop:
        async with self._door:
            if self._loop is None:
                self._loop = await self._make().__aenter__()
        return self._loop

    async def prints(self, seed: int) -> tuple[str, str]:
        """The loop's fingerprint with a seed, and with 0."""
        loop = await self._open()
        return fingerprint(loop, seed), fingerprint(loop, 0)

    async def work(self, batch: str | None, needs: str | None) -> None:
        """Take runs and drive them until `drain` is called; then close the models. See `Worker.work`."""
        loop = await self._open()
        try:
            self._worker = Worker(loop, concurrency=self._concurrency, needs=needs, batch=batch)
            if self._drained:
                self._worker.drain()
            await self._worker.work()
        finally:
            await loop.__aexit__()

    def drain(self) -> None:
        """Take no more."""
        self._drained = True
        if self._worker is not None:
            self._worker.drain()


class Actors:
    """A `Crew` of as many actors as what is open needs.

    Args:
        first: One that is open.
        another: Starts one more.
        store: The log, whose queue they share.
        most: So many at a time.
        concurrency: Runs at a time in each.
        needs: As for `Worker`.
        batch: As for `Worker`.
        on_done: Not called: who looks into the queue sees what ended.
    """

    def __init__(
        self,
        first: Any,
        another: Callable[[], Any],
        store: TraceStore,
        most: int,
        concurrency: int,
        *,
        needs: str,
        batch: str,
        on_done: Callable[..., object],
    ) -> None:
        self._another, self._store, self._most, self._concurrency = another, store, most, concurrency
        self._asked, self._waiting = (batch, needs), [first]
        self._work: dict[asyncio.Future[None], tuple[Any, Any]] = {}
        self._drained, self._news, self._busy = False, asyncio.Event(), time.monotonic()

    def drain(self) -> None:
        """Take no more; `work` returns when what is under way is done."""
        self._drained = True
        self._news.set()

    def nudge(self) -> None:
        """Actors look for themselves."""

    async def work(self) -> None:
        """Keep as many actors at work as are needed, until `drain` is called; cancelled, they give back what they have.

        Raises:
            UserError: One cannot open its models.
            StoreError: The log is lost.
        """
        import ray

        try:
            while not self._drained:
                await self._scale()
                news = asyncio.ensure_future(self._news.wait())
                await asyncio.wait({*self._work, news}, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                self._forget_ended()
            for actor, _ in self._work.values():
                actor.drain.remote()
            await self._all_ended()
            self._forget_ended()
        finally:
            for _, work in self._work.values():
                ray.cancel(work)
            await self._all_ended()
            for actor, _ in self._work.values():
                ray.kill(actor)

    async def _scale(self) -> None:
        counts = (await asyncio.to_thread(self._store.queue.counts)).get("run", {})
        runs = counts.get("queued", 0) + counts.get("running", 0)
        wanted, now = max(1, min(self._most, math.ceil(runs / self._concurrency))), time.monotonic()
        while len(self._work) < wanted:
            actor = self._waiting.pop() if self._waiting else self._another()
            work = actor.work.remote(*self._asked)
            self._work[asyncio.wrap_future(work.future())] = actor, work
        if len(self._work) == wanted:
            self._busy = now
        elif now - self._busy > _SPARE:
            [*_, (newest, _)] = self._work.values()
            newest.drain.remote()

    async def _all_ended(self) -> None:
        await asyncio.wait([asyncio.gather(*self._work, return_exceptions=True)], timeout=_GRACE)

    def _forget_ended(self) -> None:
        for ended in [work for work in self._work if work.done()]:
            del self._work[ended]
            _answer(ended)


def _answer(ended: asyncio.Future[T]) -> T:
    """What a call gave, or its own error without what Ray says around it."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return ended.result()
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise Failure(f"Ray: {one_line(error)}") from error


async def collect_on_ray(
    settings: Settings,
    source: Path,
    dead_letters: Path,
    *,
    seed: int = 0,
    concurrency: int = 8,
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
    make: Callable[[], Loop] | None = None,
) -> None:
    """As `collect`, by actors of a Ray cluster; this process opens no models.

    Args:
        settings: Of the actors' loops; `ray` says how many there may be.
        source: As for `collect`, and so are the others.
        dead_letters: Where lines go that have no complete run.
        seed: Lines without a seed get one from this and their number.
        concurrency: Runs at a time in each actor.
        on_outcome: Called for each line when it is done.
        make: Makes an actor's loop, where the settings do not say it all.

    Raises:
        UserError: As `collect`; no Ray; several machines without a shared log; models that cannot be opened.
        StoreError: The log is lost; all runs stop.
    """
    ray = start_ray()
    if settings.traces.database_url is None and len([it for it in ray.nodes() if it["Alive"]]) > 1:
        raise UserError("the cluster has several machines: set traces.database_url and traces.blobs_url")
    actor: Any = ray.remote(Actor).options(max_restarts=-1, max_task_retries=-1, **needed(settings))
    another = partial(actor.remote, make or partial(open_loop, settings), concurrency)
    with open_store(settings) as store, redirect_stdout(sys.stderr):
        first = another()
        asked = asyncio.wrap_future(first.prints.remote(seed).future())
        await asyncio.wait([asked])
        prints = _answer(asked)
        crew = partial(Actors, first, another, store, settings.ray.actors, concurrency, needs=prints[1])
        await collect_by(crew, store, prints, source, dead_letters, seed, on_outcome)
