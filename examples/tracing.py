"""Spans over OTLP: a collector of a few lines shows what is sent. Put Phoenix's or your collector's address there."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from emoloop import EmotionTarget, open_loop
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

spans = []


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP with protobuf, as collectors do."""

    def do_POST(self) -> None:  # noqa: D102
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: D102
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"

    traces = {"otlp_endpoint": endpoint, "capture_content": True}
    with open_loop(traces=traces, loop={"rounds": 2, "images": 2}) as loop:
        loop.run_sync("a dog by the sea", EmotionTarget(valence=2), seed=1)
    server.shutdown()

    for span in sorted(spans, key=lambda span: span.start_time_unix_nano):
        print(span.name, len(span.attributes))
    assert any("invoke_workflow" in span.name for span in spans)
