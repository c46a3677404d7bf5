"""A scriptable OpenAI-compatible server, for what a real one does too rarely: failing in all its ways."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes] | None


class FakeOpenAI(ThreadingHTTPServer):
    """Answers each chat request by `script(number, body)`; None hangs up without an answer.

    Attributes:
        requests: Bodies of the chat requests so far.
        most_at_once: Most chat requests that were in flight together.
        connections: TCP connections accepted so far.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, models: tuple[str, ...] = ("tiny",)):
        super().__init__(("127.0.0.1", port), Handler)
        self.models = models
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: chat("ok")
        self.requests: list[dict[str, Any]] = []
        self.busy = self.most_at_once = self.connections = 0
        self.guard = threading.Lock()
        self.open: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def process_request(self, request, client_address):
        self.connections += 1
        self.open.add(request)
        super().process_request(request, client_address)

    def kill(self) -> None:
        """Die as a killed process does: connections break, the port is free."""
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(2)
            except OSError:
                continue


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave apart, and the client's kernel would wait 40 ms between them.
    disable_nagle_algorithm = True
    server: FakeOpenAI

    def log_message(self, *args):
        pass

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        if "content-length" not in headers:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(
            200, {}, json.dumps({"data": [{"id": m, "object": "model"} for m in self.server.models]}).encode()
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.guard:
            number = len(server.requests)
            server.requests.append(body)
            server.busy += 1
            server.most_at_once = max(server.most_at_once, server.busy)
        try:
            answer = server.script(number, body)
            if answer is None:
                self.close_connection = True
            else:
                self.reply(*answer)
        except OSError:
            self.close_connection = True
        finally:
            with server.guard:
                server.busy -= 1


def chat(text: str, finish: str = "stop") -> Answer:
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }
    return 200, {}, json.dumps(body).encode()


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    return status, headers or {}, json.dumps({"error": {"message": message, "code": status}}).encode()


def hang(seconds: float) -> Answer:
    time.sleep(seconds)
    return None


@contextmanager
def serving(port: int = 0, **options: Any) -> Iterator[FakeOpenAI]:
    server = FakeOpenAI(port, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if thread.is_alive():
            server.kill()
        thread.join()
