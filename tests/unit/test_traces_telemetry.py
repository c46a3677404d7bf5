"""Spans: the right names and times, no content unless wanted, nothing at all unless configured."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from emoloop.domain import Critique, EmotionTarget, Missing, RunStatus, StopReason, UserError
from emoloop.events import (
    Critiqued,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from emoloop.settings import Settings, TraceSettings
from emoloop.traces.blobs import BlobStore
from emoloop.traces.database import StoreError
from emoloop.traces.metrics import Metrics
from emoloop.traces.recorder import StoreRecorder, open_recorder
from emoloop.traces.spans import SpanSubscriber, endpoint, open_exporter, replay, spans_of
from emoloop.traces.store import open_store
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SECRET = "a dog by the sea"


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@pytest.fixture
def events():
    run = {"run_id": "one"}
    made = {
        "prompt": SECRET,
        "model": "tiny",
        "steps": 2,
        "guidance": 3.0,
        "height": 8,
        "width": 8,
        "seconds": 1.5,
    }
    reading = Critique(analysis=SECRET, valence=1.5, arousal=-0.5, alignment=0.9)
    asked = {"model": "lvlm", "prompt_version": "critic-1", "usage": {"input_tokens": 5, "output_tokens": 2}}
    target = EmotionTarget(valence=2.0)
    done = {"status": RunStatus.COMPLETED, "stop_reason": StopReason.ROUNDS_USED, "gain": 0.4}
    return [
        RunStarted(**run, time=at(0), prompt=SECRET, target=target, seed=7),
        ImageGenerated(**run, time=at(2), sha256="a" * 64, seed=7, **made),
        GenerationFailed(**run, time=at(2.5), index=1, prompt=SECRET, seed=8, reason=SECRET),
        Critiqued(**run, time=at(4), sha256="a" * 64, critique=reading, seconds=1.0, **asked),
        Rewarded(**run, time=at(4), sha256="a" * 64, name="emotion", version="1", value=0.8),
        Rewritten(**run, time=at(5), round=1, prompt=SECRET, model="lvlm", prompt_version="r", seconds=0.5),
        ImageGenerated(**run, time=at(7), round=1, sha256="b" * 64, seed=7, **made),
        Critiqued(**run, time=at(8), round=1, sha256="b" * 64, critique=Missing(reason=SECRET), **asked),
        Rewarded(
            **run, time=at(8), round=1, sha256="b" * 64, name="emotion", version="1", reason="no critique"
        ),
        HumanFeedback(**run, time=at(9), round=1, rating=1.0, comment=SECRET, labels=["keep", "warm"]),
        RunFinished(**run, time=at(10), **done),
    ]


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def nanoseconds(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def test_replayed_spans_have_the_times_of_the_events(events, blobs):
    exporter = InMemorySpanExporter()
    count = replay(events, exporter, blobs)
    spans = exporter.get_finished_spans()
    assert count == len(spans)
    root = spans[0]
    assert (root.name, root.parent) == ("invoke_workflow emoloop", None)
    assert (root.start_time, root.end_time) == (nanoseconds(at(0)), nanoseconds(at(10)))
    assert root.attributes["emoloop.gain"] == 0.4
    assert root.attributes["emoloop.target.valence"] == 2.0
    image = next(span for span in spans if span.name == "generate_content tiny")
    assert (image.start_time, image.end_time) == (nanoseconds(at(0.5)), nanoseconds(at(2)))
    assert image.kind is SpanKind.CLIENT
    assert image.attributes["gen_ai.output.type"] == "image"
    chat = next(span for span in spans if span.name == "chat lvlm")
    assert chat.attributes["gen_ai.usage.input_tokens"] == 5
    scores = {e.attributes["gen_ai.evaluation.name"]: e.attributes for e in chat.events}
    assert scores["reward:emotion"]["gen_ai.evaluation.score.value"] == 0.8
    assert scores["arousal"]["gen_ai.evaluation.score.value"] == -0.5
    for span in spans:
        assert span.attributes["gen_ai.operation.name"] and span.attributes["gen_ai.provider.name"]
        assert span.attributes["gen_ai.conversation.id"] == "one"
        assert span.start_time <= span.end_time


def test_replayed_spans_form_one_tree(events, blobs):
    spans = spans_of(events, blobs)
    by_id = {span.context.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    assert len({span.context.trace_id for span in spans}) == 1
    shape = sorted((by_id[span.parent.span_id].name, span.name) for span in spans if span.parent)
    assert shape == [
        ("invoke_agent critic", "chat lvlm"),
        ("invoke_agent critic", "chat lvlm"),
        ("invoke_agent generator", "generate_content"),
        ("invoke_agent generator", "generate_content tiny"),
        ("invoke_agent generator", "generate_content tiny"),
        ("invoke_agent human", "human_feedback"),
        ("invoke_agent rewriter", "chat lvlm"),
        ("invoke_workflow emoloop", "invoke_agent critic"),
        ("invoke_workflow emoloop", "invoke_agent critic"),
        ("invoke_workflow emoloop", "invoke_agent generator"),
        ("invoke_workflow emoloop", "invoke_agent generator"),
        ("invoke_workflow emoloop", "invoke_agent human"),
        ("invoke_workflow emoloop", "invoke_agent rewriter"),
    ]
    failed = [span.name for span in spans if span.status.status_code is StatusCode.ERROR]
    assert failed == ["generate_content", "chat lvlm"]


def test_a_runs_span_has_the_last_word_on_its_labels_and_its_pictures(events, blobs):
    def tags(*said):
        feedback = [HumanFeedback(run_id="one", time=at(11), **it) for it in said]
        root, *others = spans_of([*events, *feedback], blobs)
        assert not any("tag.tags" in span.attributes for span in others)
        return root.attributes.get("tag.tags")

    assert tags() == ("keep", "warm")
    assert tags({"labels": ["keep"]}, {"sha256": "a" * 64, "favourite": True}) == ("keep", "\u2665")
    assert tags({"labels": []}) is None


def test_replaying_again_gives_the_same_ids(events, blobs):
    first, again = spans_of(events, blobs), spans_of(events, blobs)
    assert [span.context for span in first] == [span.context for span in again]
    assert spans_of([], blobs) == []


def test_content_is_kept_off_spans_unless_wanted(events, blobs):
    assert SECRET not in "".join(span.to_json() for span in spans_of(events, blobs))
    spans = spans_of(events, blobs, capture_content=True)
    image = next(span for span in spans if span.name == "generate_content tiny")
    assert SECRET in image.attributes["gen_ai.input.messages"]
    part = json.loads(image.attributes["gen_ai.output.messages"])[0]["parts"][0]
    assert part["type"] == "uri" and part["uri"] == blobs.path("a" * 64).as_uri()


def said(span, side):
    """The parts of a span's one message, and its reason to finish."""
    if (found := span.attributes.get(f"gen_ai.{side}.messages")) is None:
        return None
    [message] = json.loads(found)
    return message["parts"], message.get("finish_reason")


def test_each_call_has_its_question_and_its_answer(events, blobs):
    spans = spans_of(events, blobs, capture_content=True)
    by_name = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    image, _ = by_name["generate_content tiny"]
    assert said(image, "output") == ([{**PICTURE, "uri": blobs.path("a" * 64).as_uri()}], "stop")
    read, unread, rewritten = by_name["chat lvlm"]
    words, picture = said(read, "input")[0]
    assert words["content"] == f"prompt: {SECRET}\ntarget: valence 2.0"
    assert picture["uri"] == blobs.path("a" * 64).as_uri()
    [answer], reason = said(read, "output")
    assert (json.loads(answer["content"])["valence"], reason) == (1.5, "stop")
    assert said(unread, "input") and said(unread, "output") is None
    assert unread.status.description == SECRET
    assert said(rewritten, "input")[0][0]["content"].splitlines() == [
        f"prompt: {SECRET}",
        "target: valence 2.0",
        f"round 0: {SECRET}",
        "read: valence 1.50, arousal -0.50, reward 0.80",
    ]
    blind = events[0].model_copy(update={"settings": {"loop": {"rewriter": "one_shot"}}})
    *_, unseen = spans_of([blind, *events[1:6]], blobs, capture_content=True)
    assert said(unseen, "input")[0][0]["content"] == f"prompt: {SECRET}\ntarget: valence 2.0"
    [answer], reason = said(rewritten, "output")
    assert (json.loads(answer["content"])["prompt"], reason) == (SECRET, "stop")
    [root] = by_name["invoke_workflow emoloop"]
    (best, picture), reason = said(root, "output")
    assert (best["content"], picture["uri"], reason) == (SECRET, blobs.path("a" * 64).as_uri(), "stop")


PICTURE = {"type": "uri", "modality": "image", "mime_type": "image/png"}


def test_small_pictures_go_along_and_large_ones_by_address(events, blobs):
    data = b"not " * 10_000
    sha256 = blobs.put_bytes(data, "png")
    shown = [events[0], events[1].model_copy(update={"sha256": sha256})]

    def part(most):
        image = spans_of(shown, blobs, capture_content=True, picture_bytes=most)[-1]
        return said(image, "output")[0][0]

    blob = part(len(data))
    assert (blob["type"], blob["modality"], blob["mime_type"]) == ("blob", "image", "image/png")
    assert base64.b64decode(blob["content"]) == data  # whole, however long
    assert part(len(data) - 1) == {**PICTURE, "uri": blobs.path(sha256).as_uri()}
    blobs.path(sha256).write_bytes(b"damaged")
    assert part(len(data))["type"] == "uri"


def test_a_reward_is_of_the_reading_before_it(events, blobs):
    """A resumed run reads a picture again, under another node."""
    lost, unrewarded, again, rewarded = [
        it.model_copy(update={"round": 1, "index": 0}) for it in (events[7], events[8], events[3], events[4])
    ]
    later = [
        again.model_copy(update={"node": "critique.2"}),
        rewarded.model_copy(update={"node": "reward.2"}),
    ]
    chats = spans_of([events[0], lost, unrewarded, *later], blobs)[2:]
    found = [[e.attributes.get("gen_ai.evaluation.score.value") for e in chat.events] for chat in chats]
    assert found == [[None, None], [1.5, -0.5, 0.9, 0.8]]
    assert [e.attributes.get("error.type") for e in chats[0].events] == ["missing_critique", "missing_reward"]


def test_a_failed_call_names_its_error(events, blobs):
    def error(event, **update):
        span = spans_of([events[0], event.model_copy(update=update)], blobs)[-1]
        assert span.status.status_code is StatusCode.ERROR and span.status.description is None
        return span.attributes["error.type"]

    _, _, failed, _, _, rewritten, _, critiqued, *_, finished = events
    assert error(failed, reason="OutOfMemoryError: no room") == "OutOfMemoryError"
    assert error(failed, reason="TimeoutError") == "TimeoutError"
    assert error(critiqued, critique=Missing(reason="RateLimitError: slowly")) == "RateLimitError"
    assert error(critiqued, critique=Missing(reason="no answer in time")) == "missing_critique"
    why = "kept the best prompt so far: APITimeoutError: late"
    assert error(rewritten, why=why, warnings=[why]) == "APITimeoutError"
    [root] = spans_of(
        [
            events[0],
            finished.model_copy(update={"status": RunStatus.FAILED, "stop_reason": StopReason.ERROR}),
        ],
        blobs,
    )
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.ERROR, "error")


def test_what_no_model_wrote_is_no_call_to_one(events, blobs):
    human = Rewritten(run_id="one", round=1, prompt="mine", model="human", prompt_version="human")
    rated = HumanFeedback(run_id="one", sha256="a" * 64, valence=2.5, rating=4.0, comment="warm")
    *_, rewrite, _, feedback = spans_of([events[0], human, rated], blobs, capture_content=True)
    assert (rewrite.name, rewrite.kind) == ("rewrite", SpanKind.INTERNAL)
    scores = {e.attributes["gen_ai.evaluation.name"]: e.attributes for e in feedback.events}
    assert scores["human:valence"]["gen_ai.evaluation.score.value"] == 2.5
    assert scores["human:rating"]["gen_ai.evaluation.explanation"] == "warm"


def test_a_refused_replay_is_an_error(events, blobs):
    class Refusing(SpanExporter):
        def export(self, spans):
            return SpanExportResult.FAILURE

    with pytest.raises(StoreError, match="refused"):
        replay(events, Refusing(), blobs)


@pytest.fixture
def live(tmp_path):
    """(recorder maker, exporter) of live spans."""
    exporter = InMemorySpanExporter()
    exporter.shutdown = lambda: None  # several recorders send to it, one after the other

    def make(capture_content=False):
        store = open_store(Settings(home=tmp_path))
        spans = SpanSubscriber(
            SimpleSpanProcessor(exporter), store, capture_content=capture_content, picture_bytes=4
        )
        return StoreRecorder(store, spans)

    return make, exporter


def shown(spans):
    """All of the spans that a receiver sees, by id."""
    found = {span.context.span_id: json.loads(span.to_json()) for span in spans}
    assert len(found) == len(list(spans))
    return found


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 100])
async def test_live_spans_are_the_replayed_ones(live, events, blobs, capture, at_once):
    make, exporter = live
    async with make(capture) as recorder:
        sha256 = recorder.store.blobs.put_bytes(b"tiny", "png")
        events = [
            event.model_copy(update={"sha256": sha256})
            if getattr(event, "sha256", None) == "a" * 64
            else event
            for event in events
        ]
        for start in range(0, len(events), at_once):
            await recorder.record(*events[start : start + at_once])
        log = await recorder.events("one")
        ours = recorder.store.blobs
    live_spans = shown(exporter.get_finished_spans())
    assert live_spans == shown(spans_of(log, ours, capture_content=capture, picture_bytes=4))
    assert (SECRET in str(live_spans)) is capture
    assert ('"blob"' in str(live_spans)) is capture


async def test_a_round_is_sent_when_it_is_over_and_a_run_goes_on_elsewhere(live, events):
    make, exporter = live
    rewritten = next(number for number, event in enumerate(events) if isinstance(event, Rewritten))
    async with make() as recorder:
        await recorder.record(*events[:rewritten])
        assert not exporter.get_finished_spans()
        await recorder.record(events[rewritten])
        first = {span.name for span in exporter.get_finished_spans()}
        assert "invoke_agent critic" in first and "invoke_agent rewriter" not in first
    exporter.clear()
    async with make() as recorder:
        await recorder.record(*events[rewritten + 1 :])
        log, ours = await recorder.events("one"), recorder.store.blobs
    again = shown(exporter.get_finished_spans())
    assert again.items() <= shown(spans_of(log, ours)).items()
    assert "invoke_workflow emoloop" in {span["name"] for span in again.values()}


async def test_spans_leave_the_hosts_context_alone(live, events):
    make, _ = live
    before = get_current_span()
    async with make() as recorder:
        await recorder.record(*events)
        assert get_current_span() is before


def test_the_endpoint_follows_opentelemetry(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint(TraceSettings()) is None
    with pytest.raises(UserError, match="no OTLP endpoint"):
        open_exporter(TraceSettings())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/")
    assert endpoint(TraceSettings()) == "http://collector:4318/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:1/other")
    assert endpoint(TraceSettings()) == "http://collector:1/other"
    assert endpoint(TraceSettings(otlp_endpoint="http://mine:6006")) == "http://mine:6006/v1/traces"


async def test_without_an_endpoint_there_are_no_spans(tmp_path, monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    async with open_recorder(Settings(home=tmp_path)) as recorder:
        assert not any(isinstance(it, SpanSubscriber) for it in recorder.store.subscribers)


def test_metrics_are_of_the_calls_alone(events):
    reader = InMemoryMetricReader()
    metrics = Metrics(reader)
    failed = events[7].model_copy(update={"seconds": 2.0, "usage": {}})
    metrics([*events[:7], failed, *events[8:]])
    data = json.loads(reader.get_metrics_data().to_json())
    [scope] = data["resource_metrics"][0]["scope_metrics"]
    points = {(metric["name"], metric["unit"]): metric["data"]["data_points"] for metric in scope["metrics"]}
    seconds, tokens = (
        points["gen_ai.client.operation.duration", "s"],
        points["gen_ai.client.token.usage", "{token}"],
    )
    about = [(p["attributes"]["gen_ai.operation.name"], p["attributes"].get("error.type")) for p in seconds]
    assert about == [("generate_content", None), ("chat", None), ("chat", "missing_critique")]
    assert [(p["count"], p["sum"]) for p in seconds] == [(2, 3.0), (2, 1.5), (1, 2.0)]
    assert {p["attributes"]["gen_ai.token.type"]: p["sum"] for p in tokens} == {"input": 5, "output": 2}
    metrics.close()
