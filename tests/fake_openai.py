"""A scriptable OpenAI-compatible server, for what a real one does too rarely: failing in all its ways."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = tuple[int, dict[str, str], bytes | Iterator[bytes]] | None

#: Key and certificate of a server on this machine that nobody has signed.
CERTIFICATE = Path(__file__).with_name("data") / "localhost.pem"


class FakeOpenAI(ThreadingHTTPServer):
    """Answers each chat request by `script(number, body)`; None hangs up without an answer.

    Attributes:
        greet: Answers the question which models there are, by its number.
        requests: Bodies of the chat requests so far.
        keys: Their Authorization headers.
        most_at_once: Most chat requests that were in flight together.
        connections: TCP connections accepted so far.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, models: tuple[str, ...] = ("tiny",), tls: bool = False):
        super().__init__(("127.0.0.1", port), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if tls else "http"
        names = json.dumps({"data": [{"id": m, "object": "model"} for m in models]}).encode()
        self.greet: Callable[[int], Answer] = lambda number: (200, {}, names)
        self.greeted = 0
        self.on_health: Callable[[], Any] = lambda: None
        self.keys: list[str | None] = []
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: chat("ok")
        self.requests: list[dict[str, Any]] = []
        self.busy = self.most_at_once = self.connections = 0
        self.guard = threading.Lock()
        self.open: set[Any] = set()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/v1"

    def process_request(self, request, client_address):
        self.connections += 1
        self.open.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """A client that goes away, or that speaks no TLS, is no news."""

    def reset(self) -> None:
        """Break all connections off as a network does that drops them: with a reset, not an end."""
        for connection in list(self.open):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        self.open.clear()

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

    def reply(self, status: int, headers: dict[str, str], body: bytes | Iterator[bytes]) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        if isinstance(body, bytes) and "content-length" not in headers:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        for part in [body] if isinstance(body, bytes) else body:
            self.wfile.write(part)

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {}, b"")
            return self.server.on_health()
        if self.path != "/v1/models":
            return self.reply(404, {}, b'{"detail": "Not Found"}')
        self.server.greeted += 1
        answer = self.server.greet(self.server.greeted - 1)
        assert answer is not None
        self.reply(*answer)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.keys.append(self.headers["authorization"])
        if self.path not in ("/v1/chat/completions", "/tokenize"):
            return self.reply(404, {}, b'{"detail": "Not Found"}')
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


def drip() -> Answer:
    """An answer of which a byte comes now and then, each before anybody would call it late."""

    def parts() -> Iterator[bytes]:
        for _ in range(500):
            time.sleep(0.02)
            yield b" "

    return 200, {"content-length": "500"}, parts()


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
