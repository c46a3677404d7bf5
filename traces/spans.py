"""OpenTelemetry spans: a projection of committed events, off unless an OTLP endpoint is configured.

Live spans and replayed ones come from the same function over the same events, so they are equal: ids, parents,
times, content. Names follow the GenAI semantic conventions (`gen_ai.*`, still in development; the strings live here
because their Python constants are private). Spans are for looking at: the batch processor drops them under load, so
nothing is ever computed from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..domain import Critique, UserError
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from ..settings import Settings, TraceSettings
from .blobs import BlobStore
from .database import StoreError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

    from .store import TraceStore

#: The conventions that the names were taken from.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"

#: Attributes that hold what people and models wrote; dropped unless `traces.capture_content`.
CONTENT = frozenset(
    {
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.system_instructions",
        "gen_ai.tool.definitions",
        "gen_ai.evaluation.explanation",
        "emoloop.prompt",
    }
)

#: Calls that leave the agent for a model; everything else happens inside.
_CLIENT = frozenset({"chat", "generate_content", "embeddings"})

#: An agent's work in one round: its name and the round.
Turn = tuple[str, int]

#: Characters of one attribute; OpenTelemetry's own default is no limit.
_LONGEST = 32_768

_BATCH = 512


class SpanSubscriber:
    """Sends the spans of runs while they grow; to be called with the events of each commit.

    A round is sent when the next one begins or the run ends, the root when the run ends; on `close`, what is left.
    Spans of a run never enter the host program's context.

    Args:
        processor: Where spans go.
        store: The log, for the beginning of a run that another process began.
        capture_content: Whether attributes in `CONTENT` may pass.
    """

    def __init__(self, processor: SpanProcessor, store: TraceStore, *, capture_content: bool) -> None:
        self._processor = processor
        self._store = store
        self._capture = capture_content
        self._logs: dict[str, list[Event]] = {}
        self._unsent: dict[str, dict[Turn, None]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Take the events of a commit."""
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

    def _send(self, run_id: str, turns: list[Turn], *, root: bool) -> None:
        log = self._logs[run_id]
        for span in spans_of(log, self._store.blobs, capture_content=self._capture, only=turns, root=root):
            self._processor.on_end(span)
        for turn in turns:
            self._unsent[run_id].pop(turn, None)
        if root:
            del self._logs[run_id], self._unsent[run_id]


def open_spans(settings: Settings, store: TraceStore) -> SpanSubscriber | None:
    """Live spans, if an endpoint is set in `traces.otlp_endpoint` or in OpenTelemetry's own variables."""
    if endpoint(settings.traces) is None:
        return None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    processor = BatchSpanProcessor(open_exporter(settings.traces))
    return SpanSubscriber(processor, store, capture_content=settings.traces.capture_content)


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

    return OTLPSpanExporter(endpoint=url)


def replay(
    events: Iterable[Event], exporter: SpanExporter, blobs: BlobStore, *, capture_content: bool = False
) -> int:
    """Send a run's spans, rebuilt from its events.

    Ids follow from the run, so sending a run again gives the same trace.

    Returns:
        The number of spans.

    Raises:
        StoreError: The receiver refused; nothing is dropped in silence.
    """
    from opentelemetry.sdk.trace.export import SpanExportResult

    spans = spans_of(events, blobs, capture_content=capture_content)
    for start in range(0, len(spans), _BATCH):
        if exporter.export(spans[start : start + _BATCH]) is not SpanExportResult.SUCCESS:
            raise StoreError(f"the OTLP receiver refused spans {start} and following of {len(spans)}")
    return len(spans)


def spans_of(
    events: Iterable[Event],
    blobs: BlobStore,
    *,
    capture_content: bool = False,
    only: Iterable[Turn] | None = None,
    root: bool = True,
) -> list[ReadableSpan]:
    """The spans of one run: the workflow, an agent's turn per round, the model calls under it.

    Args:
        events: The run's events in order of `seq`, beginning with `run_started`.
        blobs: Where images lie; content names them by `file:` URI and never holds them.
        capture_content: Whether prompts and answers go on the spans.
        only: The turns to give; None gives all.
        root: Whether to give the workflow's span.
    """
    log = list(events)
    if not log:
        return []
    build = _Builder(log[0].run_id, capture_content)
    first, last = min(map(_begin, log)), max(event.time for event in log)
    workflow = build.span("invoke_workflow emoloop", _workflow(log), first, last, ("workflow",), None)
    if not root:
        build.spans.clear()
    turns: dict[Turn, list[Event]] = {}
    for event in log:
        if (turn := _turn_of(event)) is not None:
            turns.setdefault(turn, []).append(event)
    order = list(_AGENTS)
    for turn in sorted(turns if only is None else only, key=lambda turn: (order.index(turn[0]), turn[1])):
        _add_turn(build, turn, turns[turn], workflow, blobs)
    return build.spans


def _add_turn(build: _Builder, turn: Turn, log: list[Event], workflow: Any, blobs: BlobStore) -> None:
    agent, round_ = turn
    attributes = {"gen_ai.agent.name": agent, "emoloop.round": round_}
    start, end = min(map(_begin, log)), max(event.time for event in log)
    parent = build.span(f"invoke_agent {agent}", attributes, start, end, turn, workflow)
    for event in log:
        if isinstance(event, Rewarded):
            continue
        results = [
            (found, other.time)
            for other in log
            if isinstance(event, Critiqued) and (other is event or _rewards(other, event))
            for found in _evaluations(other)
        ]
        name, attributes = _call(event, blobs)
        build.span(name, attributes, _begin(event), event.time, event.key, parent, results)


def _turn_of(event: Event) -> Turn | None:
    agents = (agent for agent, types in _AGENTS.items() if isinstance(event, types))
    return next(((agent, event.round) for agent in agents), None)


_AGENTS: dict[str, tuple[type, ...]] = {
    "generator": (ImageGenerated, GenerationFailed),
    "critic": (Critiqued, Rewarded),
    "rewriter": (Rewritten,),
    "human": (HumanFeedback,),
}


def flatten(attributes: Mapping[str, Any], capture_content: bool) -> dict[str, Any]:
    """What OpenTelemetry accepts: no None, nested values as JSON, content only if wanted, nothing too long."""
    flat: dict[str, Any] = {}
    for key, value in attributes.items():
        if value is None or (key in CONTENT and not capture_content):
            continue
        if not isinstance(value, str | bool | int | float):
            value = json.dumps(value, ensure_ascii=False, default=str)
        flat[key] = value[:_LONGEST] if isinstance(value, str) else value
    return flat


def _defaults(name: str) -> dict[str, Any]:
    return {"gen_ai.operation.name": name.split(" ", 1)[0], "gen_ai.provider.name": "emoloop"}


def _kind(name: str) -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind.CLIENT if name.split(" ", 1)[0] in _CLIENT else SpanKind.INTERNAL


def _begin(event: Event) -> datetime:
    # An event is written when its work is done.
    return event.time - timedelta(seconds=getattr(event, "seconds", None) or 0.0)


def _rewards(event: Event, critiqued: Critiqued) -> bool:
    return isinstance(event, Rewarded) and event.index == critiqued.index


def _workflow(log: list[Event]) -> dict[str, Any]:
    attributes: dict[str, Any] = {"gen_ai.workflow.name": "emoloop"}
    for event in log:
        if isinstance(event, RunStarted):
            target = {f"emoloop.target.{k}": v for k, v in event.target.model_dump(mode="json").items()}
            attributes |= {
                "gen_ai.input.messages": _message("user", event.prompt),
                "gen_ai.request.seed": event.seed,
                **target,
            }
        elif isinstance(event, RunFinished):
            attributes |= {
                "emoloop.status": event.status.value,
                "emoloop.stop_reason": event.stop_reason.value,
                "emoloop.gain": event.gain,
                "emoloop.best_gain": event.best_gain,
            }
    return attributes


def _call(event: Event, blobs: BlobStore) -> tuple[str, dict[str, Any]]:
    match event:
        case ImageGenerated():
            return f"generate_content {event.model}", {
                "gen_ai.request.model": event.model,
                "gen_ai.request.seed": event.seed,
                "gen_ai.output.type": "image",
                "gen_ai.input.messages": _message("user", event.prompt),
                "gen_ai.output.messages": _picture("assistant", event.sha256, blobs),
                "emoloop.index": event.index,
                "emoloop.image.sha256": event.sha256,
                "emoloop.image.steps": event.steps,
                "emoloop.image.guidance": event.guidance,
                "emoloop.adapter": event.adapter,
            }
        case GenerationFailed():
            return "generate_content", {
                "gen_ai.request.seed": event.seed,
                "gen_ai.output.type": "image",
                "gen_ai.input.messages": _message("user", event.prompt),
                "emoloop.index": event.index,
                "error.type": "generation_failed",
            }
        case Critiqued():
            answered = isinstance(event.critique, Critique)
            return f"chat {event.model}", {
                "gen_ai.request.model": event.model,
                "gen_ai.output.type": "json",
                **_usage(event.usage),
                "gen_ai.input.messages": _picture("user", event.sha256, blobs),
                "gen_ai.output.messages": _message("assistant", event.critique.model_dump_json()),
                "emoloop.index": event.index,
                "emoloop.prompt_version": event.prompt_version,
                "error.type": None if answered else "missing_critique",
            }
        case Rewritten():
            return f"chat {event.model}", {
                "gen_ai.request.model": event.model,
                "gen_ai.output.type": "json",
                **_usage(event.usage),
                "gen_ai.output.messages": _message("assistant", event.prompt),
                "emoloop.prompt_version": event.prompt_version,
            }
        case _:
            return "human_feedback", {"emoloop.index": event.index}


def _usage(usage: Mapping[str, int]) -> dict[str, int]:
    # LangChain says input_tokens and output_tokens, and so does the convention.
    return {f"gen_ai.usage.{key}": value for key, value in usage.items()}


def _message(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "parts": [{"type": "text", "content": text}]}]


def _picture(role: str, sha256: str, blobs: BlobStore) -> list[dict[str, Any]]:
    part = {"type": "uri", "modality": "image", "uri": blobs.path(sha256).absolute().as_uri()}
    return [{"role": role, "parts": [part]}]


def _evaluations(event: Event) -> Iterator[dict[str, Any]]:
    match event:
        case Critiqued(critique=Critique() as critique):
            for name in ("valence", "arousal", "alignment"):
                yield {
                    "gen_ai.evaluation.name": name,
                    "gen_ai.evaluation.score.value": getattr(critique, name),
                    "gen_ai.evaluation.explanation": critique.analysis or None,
                }
        case Critiqued():
            yield {"gen_ai.evaluation.name": "critique", "error.type": "missing_critique"}
        case Rewarded():
            yield {
                "gen_ai.evaluation.name": f"reward:{event.name}",
                "gen_ai.evaluation.score.value": event.value,
                "error.type": "missing_reward" if event.value is None else None,
            }
        case _:
            pass


def _resource() -> Resource:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    named = "OTEL_SERVICE_NAME" in os.environ or SERVICE_NAME in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return Resource.create({} if named else {SERVICE_NAME: "emoloop"})


class _Builder:
    """Makes finished spans whose ids follow from the run's id and their place in it."""

    def __init__(self, run_id: str, capture_content: bool) -> None:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self.spans: list[ReadableSpan] = []
        self._run_id = run_id
        self._capture = capture_content
        self._resource = _resource()
        self._scope = InstrumentationScope("emoloop", schema_url=SCHEMA_URL)

    def span(
        self,
        name: str,
        attributes: Mapping[str, Any],
        start: datetime,
        end: datetime,
        place: tuple[Any, ...],
        parent: Any,
        results: Iterable[tuple[dict[str, Any], datetime]] = (),
    ) -> Any:
        """Add a span and return its context, for its children."""
        from opentelemetry.sdk.trace import Event as SpanEvent
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        context = SpanContext(
            trace_id=self._id(16),
            span_id=self._id(8, *place),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )
        given = {**_defaults(name), "gen_ai.conversation.id": self._run_id, **attributes}
        self.spans.append(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=flatten(given, self._capture),
                events=[
                    SpanEvent("gen_ai.evaluation.result", flatten(found, self._capture), _nanoseconds(time))
                    for found, time in results
                ],
                kind=_kind(name),
                status=Status(StatusCode.ERROR if given.get("error.type") else StatusCode.UNSET),
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
