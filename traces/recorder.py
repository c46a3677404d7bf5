"""The recorder that rooms are handed: events to the store, spans to OpenTelemetry, nothing on the event loop.

Events of all runs go through one thread, because a database has one writer anyway and waiting in a queue is
cheaper than waiting for a lock. Images are encoded in a few others: zlib lets go of the GIL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ..events import Event, Recorder, Span
from ..settings import Settings
from .spans import NoSpan, Tracing, open_tracing
from .store import TraceStore, open_store

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

_NO_SPAN = NoSpan()


class StoreRecorder(Recorder):
    """A recorder over a trace store; serves many concurrent runs and event loops.

    Args:
        store: Where events and images go; closed with the recorder.
        tracing: Live spans, or None.
    """

    def __init__(self, store: TraceStore, tracing: Tracing | None = None) -> None:
        self.store = store
        self._tracing = tracing
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="emoloop-log")
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="emoloop-blobs")

    async def record(self, *events: Event) -> None:
        """Commit events in one transaction; return only when they are durable. Known keys are skipped.

        Raises:
            StoreError: The database failed; none of the events was written.
        """
        if not events:
            return
        await _in(self._writer, self.store.append, *events)
        if self._tracing is not None:
            self._tracing.annotate(events)

    async def put_image(self, image: Image) -> str:
        """Store an image as PNG and return its SHA-256; the same pixels give the same address.

        Raises:
            OSError: The disk refused.
        """
        return await _in(self._workers, self.store.blobs.put_image, image)

    async def get_image(self, sha256: str) -> Image:
        """The stored image, RGB.

        Raises:
            OSError: It is not there, or damaged.
        """
        return await _in(self._workers, self.store.blobs.get_image, sha256)

    async def events(self, run_id: str) -> list[Event]:
        """The run's events in order of `seq`."""
        return await _in(self._workers, self.store.events, run_id)

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Span]:
        """A `gen_ai.*` span around the block; costs next to nothing when tracing is off."""
        return nullcontext(_NO_SPAN) if self._tracing is None else self._tracing.span(name, attributes)

    def close(self) -> None:
        """Finish what is being written, send the spans, close the store. May be called twice."""
        self._writer.shutdown()
        self._workers.shutdown()
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None
        self.store.close()

    async def aclose(self) -> None:
        """`close`, off the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> StoreRecorder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def open_recorder(settings: Settings) -> StoreRecorder:
    """Open the log for writing, with live spans if an OTLP endpoint is configured.

    Raises:
        UserError: The home cannot be written, or the database is not ours to use.
    """
    store = open_store(settings)
    return StoreRecorder(store, open_tracing(settings))


async def _in(pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
