"""OpenTelemetry spans: a projection of committed events, off unless an OTLP endpoint is configured.

Live spans and replayed ones come from the same function over the same events, so they are equal: ids, parents,
times, content. `genai` says what an event is in the GenAI semantic conventions; here are the tree and the sending.
Spans are for looking at: the batch processor drops them under load, so nothing is ever computed from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..domain import UserError
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    PersonaAnswered,
    Rewarded,
    Rewritten,
    RunFinished,
)
from ..settings import Settings, TraceSettings
from . import genai
from .blobs import BlobStore
from .database import StoreError
from .metrics import Metrics, open_metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

    from .store import TraceStore

#: An agent's work in one round: its name and the round.
Turn = tuple[str, int]

#: Spans that are given to the exporter at once, and characters of one request: collectors take a few megabytes.
_BATCH, _REQUEST = 512, 4_000_000


class SpanSubscriber:
    """Sends the spans of runs while they grow; to be called with the events of each commit.

    A round is sent when the next one begins or the run ends, the root when the run ends; on `close`, what is left.
    Spans of a run never enter the host program's context.

    Args:
        processor: Where spans go.
        store: The log, for the beginning of a run that another process began.
        capture_content: Whether attributes in `genai.CONTENT` may pass.
        picture_bytes: As for `spans_of`.
        metrics: Gets the same events, and is closed with this.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        store: TraceStore,
        *,
        capture_content: bool,
        picture_bytes: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        self._processor = processor
        self._store = store
        self._metrics = metrics
        self._spans = partial(spans_of, capture_content=capture_content, picture_bytes=picture_bytes)
        self._logs: dict[str, list[Event]] = {}
        self._unsent: dict[str, dict[Turn, None]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Take the events of a commit."""
        if self._metrics is not None:
            self._metrics(events)
        for event in events:
            if event.run_id not in self._logs:
                known = self._store.events(event.run_id) if event.seq > 0 else []
                self._logs[event.run_id] = [it for it in known if it.seq < event.seq]
            self._logs[event.run_id].append(event)
            unsent = self._unsent.setdefault(event.run_id, {})
            if isinstance(event, Rewritten | RunFinished):
                ended = isinstance(event, RunFinished)
                self._send(event.run_id, [t for t in unsent if ended or t[1] < event.round], root=ended)
            if (turn := _turn_of(event)) is not None:
                self._unsent.setdefault(event.run_id, {})[turn] = None

    def close(self) -> None:
        """Send what is left."""
        for run_id in list(self._logs):
            self._send(run_id, list(self._unsent[run_id]), root=True)
        self._processor.shutdown()
        if self._metrics is not None:
            self._metrics.close()

    def _send(self, run_id: str, turns: list[Turn], *, root: bool) -> None:
        log = self._logs[run_id]
        for span in self._spans(log, self._store.blobs, only=turns, root=root):
            self._processor.on_end(span)
        for turn in turns:
            self._unsent[run_id].pop(turn, None)
        if root:
            del self._logs[run_id], self._unsent[run_id]


def open_spans(settings: Settings, store: TraceStore) -> SpanSubscriber | None:
    """Live spans, if an endpoint is set in `traces.otlp_endpoint` or in OpenTelemetry's own variables.

    Metrics go along if an endpoint is set for them.
    """
    if endpoint(settings.traces) is None:
        return None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    processor = BatchSpanProcessor(open_exporter(settings.traces))
    chosen = settings.traces
    return SpanSubscriber(
        processor,
        store,
        capture_content=chosen.capture_content,
        picture_bytes=chosen.picture_bytes,
        metrics=open_metrics(chosen),
    )


def endpoint(settings: TraceSettings) -> str | None:
    """The full URL that spans go to, or None.

    As in OpenTelemetry, a base address gets `/v1/traces` appended and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is
    taken as it is.
    """
    if settings.otlp_endpoint is None and (exact := os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return exact
    base = settings.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not base:
        return None
    return base if base.endswith("/v1/traces") else f"{base.rstrip('/')}/v1/traces"


def open_exporter(settings: TraceSettings) -> SpanExporter:
    """The OTLP exporter for the configured endpoint.

    Raises:
        UserError: There is none.
    """
    url = endpoint(settings)
    if url is None:
        raise UserError("no OTLP endpoint: set EMOLOOP_TRACES__OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    class Exporter(OTLPSpanExporter):
        """As its base, in requests that receivers take: with pictures in them, a batch soon is too large for any."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            results = (super(Exporter, self).export(portion) for portion in _portions(spans))
            return next(
                (it for it in results if it is not SpanExportResult.SUCCESS), SpanExportResult.SUCCESS
            )

    return Exporter(endpoint=url)


def _portions(spans: Sequence[ReadableSpan]) -> Iterator[Sequence[ReadableSpan]]:
    start, size = 0, 0
    for number, span in enumerate(spans):
        own = sum(len(value) for value in (span.attributes or {}).values() if isinstance(value, str))
        if number > start and size + own > _REQUEST:
            yield spans[start:number]
            start, size = number, 0
        size += own
    yield spans[start:]


def replay(
    events: Iterable[Event],
    exporter: SpanExporter,
    blobs: BlobStore,
    *,
    capture_content: bool = False,
    picture_bytes: int = 0,
) -> int:
    """Send a run's spans, rebuilt from its events.

    Ids follow from the run, so sending a run again gives the same trace.

    Returns:
        The number of spans.

    Raises:
        StoreError: The receiver refused; nothing is dropped in silence.
    """
    from opentelemetry.sdk.trace.export import SpanExportResult

    spans = spans_of(events, blobs, capture_content=capture_content, picture_bytes=picture_bytes)
    for start in range(0, len(spans), _BATCH):
        if exporter.export(spans[start : start + _BATCH]) is not SpanExportResult.SUCCESS:
            raise StoreError(f"the OTLP receiver refused spans {start} and following of {len(spans)}")
    return len(spans)


def spans_of(
    events: Iterable[Event],
    blobs: BlobStore,
    *,
    capture_content: bool = False,
    picture_bytes: int = 0,
    only: Iterable[Turn] | None = None,
    root: bool = True,
) -> list[ReadableSpan]:
    """The spans of one run: the workflow, an agent's turn per round, the model calls under it.

    Args:
        events: The run's events in order of `seq`, beginning with `run_started`.
        blobs: Where pictures lie.
        capture_content: Whether prompts, answers and pictures go on the spans.
        picture_bytes: Bytes of a picture that goes along itself; of a larger one the `file:` address does.
        only: The turns to give; None gives all.
        root: Whether to give the workflow's span.
    """
    log = list(events)
    if not log:
        return []
    picture = partial(genai.picture_part, blobs=blobs, most=picture_bytes)
    build = _Builder(log[0].run_id, capture_content)
    first, last = min(map(_begin, log)), max(event.time for event in log)
    attributes = genai.workflow(log)
    if root and capture_content:
        attributes |= genai.workflow_content(log, picture)
    workflow = build.span("invoke_workflow emoloop", attributes, first, last, ("workflow",), None)
    if not root:
        build.spans.clear()
    turns: dict[Turn, list[Event]] = {}
    for event in log:
        if (turn := _turn_of(event)) is not None:
            turns.setdefault(turn, []).append(event)
    order, number = list(_AGENTS), {event.key: number for number, event in enumerate(log)}
    for turn in sorted(turns if only is None else only, key=lambda turn: (order.index(turn[0]), turn[1])):
        agent, round_ = turn
        within, results = turns[turn], _results(turns[turn])
        about = {"gen_ai.agent.name": agent, "emoloop.round": round_}
        start, end = min(map(_begin, within)), max(event.time for event in within)
        own = results.get(None, ())
        parent = build.span(f"invoke_agent {agent}", about, start, end, turn, workflow, own)
        for event in within:
            if isinstance(event, Rewarded):
                continue
            name, attributes = genai.call(event)
            if capture_content:
                attributes |= genai.content(event, log[: number[event.key]], picture)
            problem = genai.problem(event) if capture_content else None
            place, found = event.key, results.get(event.key, ())
            build.span(name, attributes, _begin(event), event.time, place, parent, found, problem)
    return build.spans


#: Results of evaluations, and when they were known.
Results = list[tuple[dict[str, Any], datetime]]


def _results(turn: Sequence[Event]) -> dict[tuple[Any, ...] | None, Results]:
    """The evaluations of a turn by the key of the call that they are of; None where there was no call.

    A picture that was read again has a call for each reading, and a reward belongs to the reading before it.
    """
    found: dict[tuple[Any, ...] | None, Results] = {}
    read: dict[int, tuple[Any, ...]] = {}
    for event in turn:
        if isinstance(event, Critiqued):
            read[event.index] = event.key
        key = read.get(event.index) if isinstance(event, Rewarded) else event.key
        found.setdefault(key, []).extend((result, event.time) for result in genai.evaluations(event))
    return found


def _turn_of(event: Event) -> Turn | None:
    agents = (agent for agent, types in _AGENTS.items() if isinstance(event, types))
    return next(((agent, event.round) for agent in agents), None)


_AGENTS: dict[str, tuple[type, ...]] = {
    "generator": (ImageGenerated, GenerationFailed),
    "critic": (Critiqued, Rewarded),
    "rewriter": (PersonaAnswered, Rewritten),
    "human": (HumanFeedback,),
}


def _begin(event: Event) -> datetime:
    # An event is written when its work is done.
    return event.time - timedelta(seconds=getattr(event, "seconds", None) or 0.0)


class _Builder:
    """Makes finished spans whose ids follow from the run's id and their place in it."""

    def __init__(self, run_id: str, capture_content: bool) -> None:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self.spans: list[ReadableSpan] = []
        self._run_id = run_id
        self._capture = capture_content
        self._resource = genai.resource()
        self._scope = InstrumentationScope("emoloop", schema_url=genai.SCHEMA_URL)

    def span(
        self,
        name: str,
        attributes: Mapping[str, Any],
        start: datetime,
        end: datetime,
        place: tuple[Any, ...],
        parent: Any,
        results: Iterable[tuple[dict[str, Any], datetime]] = (),
        problem: str | None = None,
    ) -> Any:
        """Add a span and return its context, for its children."""
        from opentelemetry.sdk.trace import Event as SpanEvent
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        context = SpanContext(
            trace_id=self._id(16),
            span_id=self._id(8, *place),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )
        given = {**genai.defaults(name), "gen_ai.conversation.id": self._run_id, **attributes}
        failed = given.get("error.type") is not None
        self.spans.append(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=genai.flatten(given, self._capture),
                events=[
                    SpanEvent(
                        "gen_ai.evaluation.result", genai.flatten(found, self._capture), _nanoseconds(time)
                    )
                    for found, time in results
                ],
                kind=SpanKind.CLIENT if genai.operation(name) in genai.CLIENT else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, problem) if failed else Status(),
                start_time=_nanoseconds(start),
                end_time=_nanoseconds(end),
                instrumentation_scope=self._scope,
            )
        )
        return context

    def _id(self, size: int, *place: Any) -> int:
        digest = hashlib.sha256(json.dumps([self._run_id, *place]).encode()).digest()
        return int.from_bytes(digest[:size], "big")


def _nanoseconds(time: datetime) -> int:
    return int(time.timestamp()) * 1_000_000_000 + time.microsecond * 1_000
