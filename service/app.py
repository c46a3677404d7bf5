"""The application: API, pages, static files, errors and access put together."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from . import api, pages, problems
from .access import Access
from .documents import Problem
from .templates import STATIC
from .work import Service


class _Timed:
    """Measures answers, without the streams: those last as long as somebody watches.

    Args:
        app: What answers.
        service: Whose figures they are.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        began, status, streams = time.perf_counter(), 500, False

        async def told(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = (
                    Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
                )
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            if scope["type"] == "http" and not streams:
                # The pattern and not the address: there are as many addresses as runs.
                route = getattr(scope.get("route"), "path", "other")
                label = self._service.metrics.requests.labels(scope["method"], route, str(status))
                label.observe(time.perf_counter() - began)


class _Static(StaticFiles):
    """Files of the package; an address that names a version is good for a year."""

    async def get_response(self, path: str, scope: Any) -> Any:
        response = await super().get_response(path, scope)
        if scope["query_string"]:
            response.headers["Cache-Control"] = api.FOREVER["Cache-Control"]
        return response


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; it opens and closes the service with itself.

    Args:
        service: Not entered yet, or entered by the caller where no ASGI server runs the application's lifespan.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with service:
            yield

    app = FastAPI(
        title="emoloop",
        version=__version__,
        summary="Runs of the loop: start, watch, steer, look at, judge.",
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        # Both pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # A generated client names its functions so.
        generate_unique_id_function=lambda route: route.name,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.include_router(api.router)
    app.include_router(api.health)
    app.include_router(pages.router, include_in_schema=False)
    app.mount("/static", _Static(directory=STATIC), name="static")
    problems.install(app)
    app.add_middleware(_Timed, service=service)
    app.add_middleware(Access, settings=service.settings.service)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            schemas = document["components"]["schemas"]
            schemas["Problem"] = Problem.model_json_schema()
            document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"bearer": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
    return app
