"""What Prometheus scrapes: the log's events as counters and histograms, the queue and the server as gauges.

Counters follow the log from where it stood when the server started, whoever writes it: the scrape reads on from the
last cursor. So each event counts once, in one server; where several serve one log, scrape one of them.
"""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select

from ..domain import Missing
from ..events import Event
from ..traces.schema import events, runs
from ..traces.store import TraceStore

#: Upper ends of the buckets: what models take, and what an answer of the API takes; seconds.
_MODELS = [0.05 * 2**power for power in range(13)]
_ANSWERS = [0.005 * 2**power for power in range(12)]


class Metrics:
    """Figures of one server.

    Args:
        store: The log.
    """

    def __init__(self, store: TraceStore) -> None:
        self._store, self._scraping = store, threading.Lock()
        self.registry = registry = CollectorRegistry()
        with store.read() as connection:
            self._cursor: int = connection.scalar(select(func.max(events.c.cursor))) or 0

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"emoloop_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"emoloop_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"emoloop_{name}", text, labels, buckets=buckets, registry=registry)

        self._begun = counter("runs_started", "Runs begun.")
        self._ended = counter("runs_finished", "Runs that ended, by status.", "status")
        self._images = counter("images", "Pictures made.")
        self._errors = counter("errors", "What failed: a picture, a critique, a reward.", "kind")
        self._tokens = counter("lvlm_tokens", "Tokens of the LVLM, in and out.", "role", "direction")
        self._image_seconds = histogram("image_seconds", "Making of a picture.", _MODELS)
        self._lvlm_seconds = histogram("lvlm_seconds", "An answer of the LVLM.", _MODELS, "role")
        self._runs = gauge("runs", "Runs in the log, by status.", "status")
        self._queue = gauge("queue", "Entries of the queue, by kind and state.", "kind", "state")
        self._active = gauge("server_runs", "Runs that this server works on.")
        self._ready = gauge("server_ready", "1 where the models are loaded, or none are wanted.")
        #: Seconds of an answer, by method, route and status.
        self.requests = histogram(
            "http_request_seconds", "An answer of the API.", _ANSWERS, "method", "route", "status"
        )

    def scrape(self, active: int, ready: bool) -> bytes:
        """All figures as text, after a look at the log.

        Args:
            active: Runs that this server works on.
            ready: Whether it can take more.
        """
        with self._scraping:
            while batch := self._store.tail(self._cursor):
                self._cursor = batch[-1].cursor
                for event in batch:
                    self._count(event)
            with self._store.read() as connection:
                standing = select(runs.c.status, func.count()).group_by(runs.c.status)
                for status, count in connection.execute(standing):
                    self._runs.labels(status).set(count)
            for kind, states in self._store.queue.counts().items():
                for state, count in states.items():
                    self._queue.labels(kind, state).set(count)
            self._active.set(active)
            self._ready.set(ready)
            return generate_latest(self.registry)

    def _count(self, event: Event) -> None:
        match event.type:
            case "run_started":
                self._begun.inc()
            case "run_finished":
                self._ended.labels(event.status.value).inc()
            case "image_generated":
                self._images.inc()
                if event.seconds is not None:
                    self._image_seconds.observe(event.seconds)
            case "generation_failed":
                self._errors.labels("image").inc()
            case "critiqued":
                if isinstance(event.critique, Missing):
                    self._errors.labels("critique").inc()
                self._asked("critic", event.usage, event.seconds)
            case "rewarded":
                if event.value is None:
                    self._errors.labels("reward").inc()
            case "rewritten":
                self._asked("rewriter", event.usage, event.seconds)
            case _:
                pass

    def _asked(self, role: str, usage: dict[str, int], seconds: float | None) -> None:
        for name in ("input", "output"):
            self._tokens.labels(role, name).inc(usage.get(f"{name}_tokens", 0))
        if seconds is not None:
            self._lvlm_seconds.labels(role).observe(seconds)
