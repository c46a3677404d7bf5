"""A service on a painter and a scripted chat model, and a client that speaks to it without a socket."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from emoloop.graph.loop import open_loop
from emoloop.service.app import create_app
from emoloop.service.work import Service
from emoloop.settings import Settings, load_settings
from painter import Painter
from scripted import Scripted

API = "/api/v1"
REQUEST = {"prompt": "a dog by the sea", "target": {"valence": 2, "arousal": -1}, "seed": 3}


def settings_of(home: Path, **service: Any) -> Settings:
    loop = {"rounds": 2, "images": 2, "tolerance": 0.0}
    return load_settings({"home": home, "loop": loop, "service": service})


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
