"""A service on a painter and a scripted chat model, and a client that speaks to it without a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from emoloop.graph.loop import open_loop
from emoloop.service.app import create_app
from emoloop.service.server import config_of
from emoloop.service.work import Service
from emoloop.settings import Settings, load_settings
from emoloop.tools.images.base import GeneratedImage, ImageRequest
from painter import Painter
from scripted import Scripted

API = "/api/v1"
REQUEST = {"prompt": "a dog by the sea", "target": {"valence": 2, "arousal": -1}, "seed": 3}


def settings_of(home: Path, **service: Any) -> Settings:
    loop = {"rounds": 2, "images": 2, "tolerance": 0.0}
    return load_settings({"home": home, "loop": loop, "service": {"jobs": 0, **service}})


def service_of(settings: Settings, painter: Painter | None = None, **keywords: Any) -> Service:
    loop = open_loop(settings, generator=painter or Painter(), lvlm=Scripted(**keywords))
    return Service(settings, loop=loop)


@asynccontextmanager
async def client_of(service: Service, **keywords: Any) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with (
        service,
        httpx.AsyncClient(transport=transport, base_url="http://localhost", **keywords) as client,
    ):
        yield client


async def ended(client: httpx.AsyncClient, run_id: str) -> list[dict[str, Any]]:
    """Watch a run to its end; what the stream said."""
    said: list[dict[str, Any]] = []
    async with client.stream("GET", f"{API}/runs/{run_id}/watch") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        message: dict[str, Any] = {}
        async for line in response.aiter_lines():
            key, _, value = line.partition(": ")
            if key in ("id", "event", "data"):
                message[key] = value
            elif not line and message:
                said.append(message)
                message = {}
    return said


@contextmanager
def serving(service: Service) -> Generator[str]:
    """A real server on a free port, in a thread; gives its address."""
    config = config_of(service)
    config.port, config.timeout_graceful_shutdown = 0, 1
    server, started = uvicorn.Server(config), threading.Event()
    startup = server.startup

    async def told(*args: Any, **keywords: Any) -> None:
        await startup(*args, **keywords)
        started.set()

    server.startup = told
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Distilled(Painter):
    """A painter that stands for a pipeline: with an adapter it paints brighter."""

    pipe = object()

    def __init__(self, adapter: str | None) -> None:
        super().__init__()
        self.adapter, self.scale = adapter, 1.0

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        strong = self.adapter is not None and self.scale > 0
        return await super().generate(
            [replace(it, prompt=it.prompt + " bright") if strong else it for it in requests]
        )


def fake_playground(patch: Any) -> None:
    """Let the playground load no model."""
    patch.setattr("emoloop.service.playground.load_generator", lambda settings: Distilled(settings.adapter))
    patch.setattr(
        "emoloop.service.playground._rescale", lambda generator, scale: setattr(generator, "scale", scale)
    )
