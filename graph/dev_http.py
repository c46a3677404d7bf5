"""What LangGraph's server gives beside the graph: `GET /images/{sha256}`, a picture that state or stream names.

`langgraph.json` names it as `http.app`. Nothing is loaded for it: the pictures are files of the home. When the server
ends, it closes the loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

from ..settings import load_settings
from ..traces.blobs import open_blobs
from . import dev
from .state import picture_url


def picture(request: Request) -> FileResponse:
    """The PNG of a SHA-256; it never changes."""
    sha256 = request.path_params["sha256"]
    settings = load_settings()
    blobs = open_blobs(settings, settings.home.expanduser())
    if not re.fullmatch("[0-9a-f]{64}", sha256) or not (path := blobs.path(sha256)).is_file():
        raise HTTPException(404, f"no picture {sha256!r}")
    return FileResponse(path, headers={"Cache-Control": "public, max-age=31536000, immutable"})


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    """The server's own."""
    yield
    await asyncio.to_thread(dev.close)


app = Starlette(routes=[Route(picture_url("{sha256}"), picture)], lifespan=lifespan)
