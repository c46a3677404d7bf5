"""Errors as RFC 9457 problem documents, and as a page where a browser asks for one."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ..domain import Failure, UserError
from ..traces.database import StoreError
from .documents import Problem
from .errors import Busy, Conflict, NotFound, Unavailable
from .templates import render

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

#: Errors of ours, the most special first.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFound, 404),
    (Conflict, 409),
    (Busy, 429),
    (Unavailable, 503),
    (StoreError, 503),
    (UserError, 422),
    (Failure, 500),
)

#: For the OpenAPI document: any operation may answer so.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem, after RFC 9457",
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": {
                    "type": "about:blank",
                    "title": "Not Found",
                    "status": 404,
                    "detail": "no run '261127-101500-3f2a1c'",
                },
            }
        },
    }
}


def problem(status: int, detail: str = "", headers: dict[str, str] | None = None) -> Response:
    """A problem document."""
    document = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    # Text from outside may hold what no encoding takes.
    body = document.model_dump_json().encode("utf-8", "replace")
    return Response(body, status, headers, media_type=MEDIA_TYPE)


def for_browser(request: Request) -> bool:
    """Whether a page is wanted, and not a document."""
    return not request.url.path.startswith("/api/") and "text/html" in request.headers.get("accept", "")


def answer(request: Request, status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """A problem in the form that the client asks for."""
    if not for_browser(request):
        return problem(status, detail, headers)
    html = render("error.html.jinja", title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(html, status, headers, media_type="text/html")


def install(app: FastAPI) -> None:
    """Answer all errors of an application so."""

    def ours(request: Request, error: Exception) -> Response:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        return answer(request, status, str(error), {"Retry-After": "5"} if status in (429, 503) else None)

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        known = HTTPStatus(error.status_code).phrase
        return answer(request, error.status_code, "" if error.detail == known else str(error.detail), headers)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return answer(request, 422, f"{where}: {first['msg']}" if where else first["msg"])

    def unknown(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(request, 500, "the server's log says more")

    for kind in (UserError, Failure):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)
