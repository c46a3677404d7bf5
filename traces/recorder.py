"""The log as async code uses it: committed events, pictures, and nothing on the event loop.

One thread writes, because a database has one writer anyway. All that is waiting when it gets its turn is committed
in one transaction (a group commit), so that many runs share the cost of a sync. Whoever subscribes gets the events
that a commit added, in the order of their cursors: the loop's stream and the spans are such subscribers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..domain import RunResult, UserError
from ..events import Event
from ..settings import Settings
from .blobs import encode
from .database import StoreError
from .fold import Fold
from .queue import RENEW, is_gone, let_go, owner_name
from .spans import SpanSubscriber, open_spans
from .store import Subscriber, TraceStore, open_store

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

#: Events in one transaction, and seconds that it waits for as many callers as shared the last ones: what a batch of
#: pictures or answers brings comes within a moment, and a sync costs more than that moment.
_LARGEST, _GATHER = 512, 0.002

#: Pictures, and pixels of them, that one thread encodes and syncs in a row: a batch of small ones takes one turn of the
#: threads, large ones are encoded side by side. And bytes of PNG that are kept, since the critic asks for them next.
_TOGETHER, _PIXELS, _RECENT = 8, 2**18, 2**26


class _Waiting:
    """Events that somebody waits to see committed."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Event]] = self.loop.create_future()

    def settle(self, outcome: list[Event] | BaseException) -> None:
        if self.future.done():  # nobody waits any more
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class StoreRecorder:
    """Writes and follows a trace store; serves many concurrent runs and event loops.

    Args:
        store: Where events and images go; closed with the recorder.
        spans: A subscriber that sends spans, or None.

    Attributes:
        taken: Runs that a worker has taken from the queue, with its name, until they are claimed here.
    """

    def __init__(self, store: TraceStore, spans: SpanSubscriber | None = None) -> None:
        self.store = store
        self._spans = spans
        if spans is not None:
            store.subscribers.append(spans)
        self._followers: dict[str, list[Subscriber]] = {}
        store.subscribers.append(self._tell)
        self._queue: deque[_Waiting] = deque()
        self._guard = threading.Condition()
        self._writing = False
        # Pictures that came in this turn of an event loop.
        self._pictures: dict[asyncio.AbstractEventLoop, list[tuple[Image, int, asyncio.Future[str]]]] = {}
        self._recent = _Recent()
        self.taken: dict[str, str] = {}
        self._claims: dict[str, str] = {}  # owner → run, of all claims that are asked for or held
        self._closed = False
        self._shared = deque([1], maxlen=4)  # how many callers shared each of the last commits
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="emoloop-log")
        self._workers = ThreadPoolExecutor(8, thread_name_prefix="emoloop-blobs")

    # ---- events

    async def record(self, *events: Event) -> list[Event]:
        """Commit events; return only when they are durable.

        Returns:
            The events as the log holds them: where a key was known, the first event of that key.

        Raises:
            StoreError: The database failed, or the log is closed; none of the events was written.
        """
        if not events:
            return []
        waiting = _Waiting(events)
        with self._guard:
            if self._closed:
                raise StoreError("the log is closed")
            self._queue.append(waiting)
            start, self._writing = not self._writing, True
            if len(self._queue) >= max(self._shared):
                self._guard.notify()
        if start:
            self._writer.submit(self._write)
        return await waiting.future

    def _write(self) -> None:
        with self._guard:
            self._guard.wait_for(lambda: len(self._queue) >= max(self._shared), _GATHER)
        while group := self._next_group():
            outcomes = self._commit(group)
            for loop in {waiting.loop for waiting in group}:
                here = [pair for pair in zip(group, outcomes, strict=True) if pair[0].loop is loop]
                with suppress(RuntimeError):  # an event loop that was closed meanwhile
                    loop.call_soon_threadsafe(_settle, here)

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        size = 0
        with self._guard:
            while self._queue and (not group or size + len(self._queue[0].events) <= _LARGEST):
                group.append(self._queue.popleft())
                size += len(group[-1].events)
            self._writing = bool(group)
            if group:
                self._shared.append(len(group))
        return group

    def _commit(self, group: list[_Waiting]) -> list[list[Event] | BaseException]:
        try:
            return list(self.store.append_all([waiting.events for waiting in group]))
        except Exception as error:
            if len(group) == 1:
                return [error]
            # One batch that the database refuses must not take the others along.
            return [outcome for waiting in group for outcome in self._commit([waiting])]

    @contextmanager
    def followed(self, run_id: str, follower: Subscriber) -> Generator[None]:
        """Have a function called, in the writer's thread, with the run's events of each commit from now on."""
        with self._guard:
            self._followers.setdefault(run_id, []).append(follower)
        try:
            yield
        finally:
            with self._guard:
                self._followers[run_id].remove(follower)
                if not self._followers[run_id]:
                    del self._followers[run_id]

    def _tell(self, events: Sequence[Event]) -> None:
        # By run, so that a commit costs the same however many runs are open.
        own: dict[str, list[Event]] = {}
        for event in events:
            own.setdefault(event.run_id, []).append(event)
        for run_id, some in own.items():
            for follower in tuple(self._followers.get(run_id, ())):
                follower(some)

    async def events(self, run_id: str) -> list[Event]:
        """The run's events in order of `seq`."""
        return await self._in(self._workers, self.store.events, run_id)

    async def fold(self, run_id: str, *, fresh: bool = True) -> Fold:
        """The run's state as the log has it now; what others wrote meanwhile is seen only by a fresh look."""
        held = None if fresh else self.store.held(run_id)
        return held or await self._in(self._workers, self.store.fold, run_id)

    async def result(self, run_id: str) -> RunResult:
        """The run as the loop returns it."""
        whole = await self.fold(run_id, fresh=False)
        return whole.result(self.store.blobs.path, self.store.home)

    @asynccontextmanager
    async def claimed(self, run_id: str) -> AsyncGenerator[None]:
        """Hold a run while it is worked on, so that nobody else works on it at the same time.

        A run that a worker of this process has taken from the queue is held by that worker.

        Raises:
            UserError: Somebody else does.
        """
        if self.taken.pop(run_id, None):
            yield
            return
        owner = owner_name()
        self._claims[owner] = run_id
        renewing = None
        try:
            while (other := await self._in(self._workers, self.store.queue.claim, run_id, owner)) is not None:
                if not is_gone(other):
                    raise UserError(
                        f"run {run_id!r} is being worked on by {other}: wait until it is done, or choose another id"
                    )
                await self._in(self._workers, self.store.queue.release, run_id, other)
            renewing = asyncio.create_task(self._renew(run_id, owner))
            yield
        finally:
            if renewing is not None:
                renewing.cancel()
                with suppress(asyncio.CancelledError, StoreError):
                    await renewing
            try:
                await self._in(self._workers, self.store.queue.release, run_id, owner)
                self._claims.pop(owner, None)
            except StoreError:  # closed by now, and released by that; or the disk is full
                let_go.add(owner)

    async def _renew(self, run_id: str, owner: str) -> None:
        while True:
            await asyncio.sleep(RENEW)
            await self._in(self._workers, self.store.queue.claim, run_id, owner)

    # ---- images

    async def put_image(self, image: Image) -> str:
        """Store an image as PNG and return its SHA-256; the same pixels give the same address.

        Raises:
            OSError: The disk refused.
        """
        loop, pixels = asyncio.get_running_loop(), max(1, image.width * image.height)
        waiting = self._pictures.setdefault(loop, [])
        if not waiting:
            # A batch's pictures all come in one turn of the loop, and go on together.
            loop.call_soon(self._put_waiting, loop)
        waiting.append((image, pixels, future := loop.create_future()))
        return await future

    def _put_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._pictures.pop(loop)
        while waiting:
            many = min(_TOGETHER, max(1, _PIXELS // waiting[0][1]))
            part, waiting = waiting[:many], waiting[many:]
            images, _, futures = zip(*part, strict=True)
            stored = loop.create_task(self._in(self._workers, self._put_all, images))
            stored.add_done_callback(partial(_settle_pictures, futures))

    def _put_all(self, images: Sequence[Image]) -> list[str | Exception]:
        encoded = [_encoded(image) for image in images]
        pngs = [it for it in encoded if isinstance(it, bytes)]
        addresses = iter(self.store.blobs.put_many(pngs, "png"))
        stored = [next(addresses) if isinstance(it, bytes) else it for it in encoded]
        for sha256, png in zip(stored, encoded, strict=True):
            if isinstance(sha256, str) and isinstance(png, bytes):
                self._recent.add(sha256, png)
        return stored

    async def get_png(self, sha256: str) -> bytes:
        """The stored image as PNG; one that was stored here just now is not read back.

        Raises:
            OSError: It is not there, or damaged.
        """
        return self._recent.get(sha256) or await self._in(self._workers, self.store.blobs.get_bytes, sha256)

    async def get_image(self, sha256: str) -> Image:
        """The stored image, RGB.

        Raises:
            OSError: It is not there, or damaged.
        """
        return await self._in(self._workers, self.store.blobs.get_image, sha256)

    # ---- closing

    def close(self) -> None:
        """Finish what is being written, send the spans, close the store. May be called twice."""
        with self._guard:
            self._closed = True
        self._writer.shutdown()
        self._workers.shutdown()
        while self._claims:  # a claim may have come through after its task was ended
            owner, run_id = self._claims.popitem()
            with suppress(StoreError):
                self.store.queue.release(run_id, owner)
        if self._spans is not None:
            self._spans.close()
            self._spans = None
        self.store.close()

    async def aclose(self) -> None:
        """`close`, off the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> StoreRecorder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
        if self._closed:
            raise StoreError("the log is closed")
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)


class _Recent:
    """The newest PNGs by address, up to `_RECENT` bytes; safe for many threads."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}
        self._size = 0
        self._lock = threading.Lock()

    def add(self, sha256: str, png: bytes) -> None:
        with self._lock:
            self._size += len(png) - len(self._kept.pop(sha256, b""))
            self._kept[sha256] = png
            while self._size > _RECENT:
                self._size -= len(self._kept.pop(next(iter(self._kept))))

    def get(self, sha256: str) -> bytes | None:
        return self._kept.get(sha256)


def _settle(pairs: list[tuple[_Waiting, list[Event] | BaseException]]) -> None:
    for waiting, outcome in pairs:
        waiting.settle(outcome)


def _encoded(image: Image) -> bytes | Exception:
    # What is no picture concerns its own run alone.
    try:
        return encode(image)
    except Exception as error:
        return error


def _settle_pictures(
    futures: Sequence[asyncio.Future[str]], stored: asyncio.Future[list[str | Exception]]
) -> None:
    error = asyncio.CancelledError() if stored.cancelled() else stored.exception()
    outcomes = [error] * len(futures) if error else stored.result()
    for future, outcome in zip(futures, outcomes, strict=True):
        if future.done():  # nobody waits any more
            continue
        if isinstance(outcome, asyncio.CancelledError):  # the event loop is ending
            future.cancel()
        elif isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def open_recorder(settings: Settings) -> StoreRecorder:
    """Open the log for writing, with live spans if an OTLP endpoint is configured.

    Raises:
        UserError: The home cannot be written, or the database is not ours to use.
    """
    store = open_store(settings)
    return StoreRecorder(store, open_spans(settings, store))
