"""OpenTelemetry spans: a projection of the log's call sites, off unless an OTLP endpoint is configured.

Names follow the GenAI semantic conventions (`gen_ai.*`, still in development; the strings live here because
their Python constants are private). Spans are for looking at: the batch processor drops them under load, so
nothing is ever computed from them. `replay` makes them again from the log, whole, with the events' own times.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    Span,
)
from ..settings import Settings, TraceSettings
from .blobs import BlobStore
from .database import StoreError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

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

#: Characters of one attribute; OpenTelemetry's own default is no limit.
_LONGEST = 32_768

_BATCH = 512


class Tracing:
    """Live spans through one tracer provider of our own, so that the host program's is left alone.

    Args:
        provider: Where spans go.
        capture_content: Whether attributes in `CONTENT` may pass.
    """

    def __init__(self, provider: TracerProvider, *, capture_content: bool) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("emoloop", schema_url=SCHEMA_URL)
        self._capture = capture_content

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> Iterator[Span]:
        """A span around the block, the current one inside it; an exception marks it with `error.type`."""
        from opentelemetry.trace import Status, StatusCode

        given = {**_defaults(name), **(attributes or {})}
        with self._tracer.start_as_current_span(
            name,
            kind=_kind(name),
            attributes=flatten(given, self._capture),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield _Live(span, self._capture)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__qualname__)
                # A message may quote a prompt, so it is content as well.
                span.set_status(Status(StatusCode.ERROR, str(error) if self._capture else None))
                raise

    def annotate(self, batch: Iterable[Event]) -> None:
        """Put critiques and rewards on the current span as `gen_ai.evaluation.result` events."""
        from opentelemetry.trace import get_current_span

        span = get_current_span()
        for event in batch:
            for attributes in _evaluations(event):
                span.add_event("gen_ai.evaluation.result", flatten(attributes, self._capture))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class _Live:
    def __init__(self, span: Any, capture: bool) -> None:
        self._span = span
        self._capture = capture

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes(flatten(attributes, self._capture))


class NoSpan:
    """What a block gets where tracing is off."""

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Nothing."""


def open_tracing(settings: Settings) -> Tracing | None:
    """Live spans, if an endpoint is set in `traces.otlp_endpoint` or in OpenTelemetry's own variables."""
    if endpoint(settings.traces) is None:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=_resource(), span_limits=_limits())
    provider.add_span_processor(BatchSpanProcessor(open_exporter(settings.traces)))
    return Tracing(provider, capture_content=settings.traces.capture_content)


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
    events: Iterable[Event], blobs: BlobStore, *, capture_content: bool = False
) -> list[ReadableSpan]:
    """The spans of one run: the workflow, an agent's turn per round, the model calls under it.

    Args:
        events: The run's events in order of `seq`, beginning with `run_started`.
        blobs: Where images lie; content names them by `file:` URI and never holds them.
        capture_content: Whether prompts and answers go on the spans.
    """
    log = list(events)
    if not log:
        return []
    build = _Builder(log[0].run_id, capture_content)
    first, last = min(map(_begin, log)), max(event.time for event in log)
    root = build.span("invoke_workflow emoloop", _workflow(log), first, last, ("workflow",), None)
    for agent, types in _AGENTS.items():
        for round_ in sorted({event.round for event in log if isinstance(event, types)}):
            turn = [event for event in log if isinstance(event, types) and event.round == round_]
            start, end = min(map(_begin, turn)), max(event.time for event in turn)
            attributes = {"gen_ai.agent.name": agent, "emoloop.round": round_}
            place = (agent, round_)
            parent = build.span(f"invoke_agent {agent}", attributes, start, end, place, root)
            for event in turn:
                if isinstance(event, Rewarded):
                    continue
                results = [
                    (attributes, other.time)
                    for other in turn
                    if isinstance(event, Critiqued) and (other is event or _rewards(other, event))
                    for attributes in _evaluations(other)
                ]
                name, attributes = _call(event, blobs)
                build.span(name, attributes, _begin(event), event.time, event.key, parent, results)
    return build.spans


_AGENTS: dict[str, tuple[type, ...]] = {
    "generator": (ImageGenerated, GenerationFailed),
    "critic": (Critiqued, Rewarded),
    "rewriter": (Rewritten,),
    "human": (HumanFeedback,),
}


def flatten(attributes: Mapping[str, Any], capture_content: bool) -> dict[str, Any]:
    """What OpenTelemetry accepts: no None, nested values as JSON, content only if wanted."""
    flat: dict[str, Any] = {}
    for key, value in attributes.items():
        if value is None or (key in CONTENT and not capture_content):
            continue
        plain = isinstance(value, str | bool | int | float)
        if isinstance(value, list | tuple):
            plain = all(isinstance(item, str) for item in value)
        flat[key] = value if plain else json.dumps(value, ensure_ascii=False, default=str)
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


def _resource() -> Resource:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go first.
    ours = Resource({SERVICE_NAME: "emoloop"})
    return ours if "OTEL_SERVICE_NAME" not in os.environ else Resource.create()


def _limits() -> SpanLimits:
    from opentelemetry.sdk.trace import SpanLimits

    return SpanLimits(max_span_attribute_length=_LONGEST)


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
