"""Spans over the wire: a collector of our own reads what the exporter sends."""

from __future__ import annotations

import contextvars
import gzip
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from emoloop.domain import Critique, EmotionTarget
from emoloop.events import Critiqued, ImageGenerated, RunStarted
from emoloop.graph.loop import open_loop
from emoloop.settings import Settings
from emoloop.traces.recorder import open_recorder
from emoloop.traces.spans import open_exporter, replay
from emoloop.traces.store import open_store
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_current_span
from painter import Painter
from scripted import Scripted


@pytest.fixture
def collector():
    """(base address, spans and metrics received so far); refuses what is larger than common receivers take."""
    spans, metrics = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if len(body) > 8_000_000:
                self.send_error(413)
                return
            if self.path == "/v1/metrics":
                found = MessageToDict(ExportMetricsServiceRequest.FromString(body))["resourceMetrics"]
                metrics.extend(it for resource in found for it in resource["scopeMetrics"][0]["metrics"])
                body = b""
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans.extend((self.path, names.get("service.name"), span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", spans, metrics
    server.shutdown()
    server.server_close()
    thread.join()


async def test_live_and_replayed_spans_arrive(collector, tmp_path, monkeypatch):
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    address, spans, _ = collector
    settings = Settings(home=tmp_path, traces={"otlp_endpoint": address})
    async with open_recorder(settings) as recorder:
        await recorder.record(RunStarted(run_id="one", prompt="p", target=EmotionTarget(valence=1.0), seed=1))
    assert [(path, service, span.name) for path, service, span in spans] == [
        ("/v1/traces", "emoloop", "invoke_workflow emoloop")
    ]
    with open_store(settings, read_only=True) as store:
        exporter = open_exporter(settings.traces)
        assert replay(store.events("one"), exporter, store.blobs) == 1
        exporter.shutdown()
        (started,) = store.events("one")
    _, service, span = spans[1]
    assert (service, span.name) == ("emoloop", "invoke_workflow emoloop")
    assert span.start_time_unix_nano // 1000 == round(started.time.timestamp() * 1_000_000)


async def test_spans_with_pictures_arrive_whatever_their_size(collector, tmp_path):
    """40 pictures of 300 kB, each with its picture on two spans: 32 MB, more than a receiver takes at once."""
    address, spans, _ = collector
    settings = Settings(home=tmp_path, traces={"otlp_endpoint": address, "capture_content": True})
    made = {"prompt": "p", "seed": 1, "model": "tiny", "height": 8, "width": 8}
    read = {"critique": Critique(valence=1, arousal=0, alignment=1), "model": "lvlm", "prompt_version": "1"}
    async with open_recorder(settings) as recorder:
        put = recorder.store.blobs.put_bytes
        pictures = [put(random.Random(index).randbytes(300_000), "png") for index in range(40)]
        events = [RunStarted(run_id="one", prompt="p", target=EmotionTarget(valence=1.0), seed=1)]
        for index, sha256 in enumerate(pictures):
            place = {"run_id": "one", "index": index, "sha256": sha256}
            events += [ImageGenerated(**place, **made), Critiqued(**place, **read)]
        await recorder.record(*events)
    shown = [json.dumps(MessageToDict(span)) for _, _, span in spans]
    assert len(shown) == 1 + 2 + 80
    assert sum("blob" in span for span in shown) == 80


async def test_the_hosts_context_is_untouched_and_each_run_has_its_own_trace(collector, tmp_path):
    address, spans, _ = collector
    target = EmotionTarget(valence=1.0)
    loop = open_loop(
        generator=Painter(),
        lvlm=Scripted(),
        home=str(tmp_path),
        traces={"otlp_endpoint": address},
        loop={"rounds": 2, "images": 2},
    )
    tracer = TracerProvider().get_tracer("host")
    async with loop:
        with tracer.start_as_current_span("host") as host:
            before = dict(contextvars.copy_context())
            async for _ in loop.stream("a dog", target, seed=1, run_id="left"):
                assert get_current_span() is host
                break
            assert dict(contextvars.copy_context()) == before
            with pytest.raises(ZeroDivisionError):
                await loop.run("a dog", target, seed=1, run_id="raised", on_event=lambda _: 1 / 0)
            assert dict(contextvars.copy_context()) == before
            streams = [loop.stream("a dog", target, seed=1, run_id=name) for name in ("one", "two")]
            for _ in range(5):
                for stream in streams:
                    await anext(stream)
                    assert dict(contextvars.copy_context()) == before
            for stream in streams:
                await stream.aclose()
            assert dict(contextvars.copy_context()) == before
            await loop.run("a dog", target, seed=1, run_id="after")
    traces = {}
    for _, _, span in spans:
        [run] = [it.value.string_value for it in span.attributes if it.key == "gen_ai.conversation.id"]
        traces.setdefault(run, set()).add(span.trace_id)
    assert set(traces) == {"left", "raised", "one", "two", "after"}
    assert len(set.union(*traces.values())) == 5
    assert host.get_span_context().trace_id.to_bytes(16, "big") not in set.union(*traces.values())
    roots = [span for _, _, span in spans if not span.parent_span_id]
    assert len(roots) == 5


async def test_metrics_go_to_their_own_endpoint(collector, tmp_path):
    address, _, metrics = collector
    traces = {"otlp_endpoint": address, "metrics_endpoint": f"{address}/v1/metrics"}
    loop = {"rounds": 2, "images": 2}
    async with open_loop(
        generator=Painter(), lvlm=Scripted(), home=str(tmp_path), traces=traces, loop=loop
    ) as it:
        await it.run("a dog", EmotionTarget(valence=1.0), seed=1)
    counts = {metric["name"]: 0 for metric in metrics}
    for metric in metrics:
        counts[metric["name"]] += sum(int(point["count"]) for point in metric["histogram"]["dataPoints"])
    # Two rounds of two pictures, each read once, and a rewrite; tokens in and out of the five chats.
    assert counts == {"gen_ai.client.operation.duration": 9, "gen_ai.client.token.usage": 10}
