"""The HTTP API, version 1: runs, pictures, feedback, jobs. Its OpenAPI document is at `/api/v1/openapi.json`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from . import images
from .bundle import zipped
from .documents import (
    Again,
    Answer,
    EventPage,
    Feedback,
    Listing,
    Play,
    Played,
    RunDocument,
    RunPage,
    RunRequest,
    RunSummary,
    Said,
)
from .errors import Unavailable
from .jobs import JobDocument, JobRequest
from .problems import RESPONSES
from .work import ENDED, Service, watched

#: A stream of events, with the seconds between signs of life, and those that a client may take for a message.
stream = partial(EventSourceResponse, ping=15, send_timeout=30)

#: What a report may do: its style and pictures are in it, and nothing else is.
_REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"

#: Events of a page.
_EVENTS = 1000

FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def service_of(request: Request) -> Service:
    """The service behind an application."""
    return request.app.state.service


Of = Annotated[Service, Depends(service_of)]
RunId = Annotated[
    str,
    Path(pattern=r"^[A-Za-z0-9_:@+-][A-Za-z0-9_.:@+-]{0,119}$", examples=["261127-101500-3f2a1c"]),
]
Address = Annotated[
    str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the picture.", examples=["0" * 64])
]
Cursor = Annotated[int, Query(ge=0, lt=2**63, description="Only events after this cursor.")]
LastEvent = Annotated[int | None, Header(ge=0, lt=2**63, description="The last `id` seen; over `after`.")]
Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="The same key starts one run or job, however often it is sent.",
    ),
]


def _media(kind: str, **schema: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": {"type": "string", **schema}}}}}


_ZIP, _PNG, _WEBP = (_media(it, format="binary") for it in ("application/zip", "image/png", "image/webp"))
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has it."}}

router = APIRouter(prefix="/api/v1", responses=RESPONSES)
health = APIRouter(tags=["health"], responses=RESPONSES)


async def _summary(service: Service, run_id: str) -> RunSummary:
    return (await service.run(run_id)).run


@router.post("/runs", status_code=202, tags=["runs"])
async def start_run(
    service: Of,
    wanted: RunRequest,
    response: Response,
    idempotency_key: Key = None,
) -> RunSummary:
    """Start a run; it goes on after the answer. `Location` is where it is."""
    run_id = await service.start(wanted, idempotency_key)
    response.headers["Location"] = f"/api/v1/runs/{run_id}"
    return await _summary(service, run_id)


@router.get("/runs", tags=["runs"])
async def list_runs(service: Of, wanted: Annotated[Listing, Query()]) -> RunPage:
    """List runs, a page at a time."""
    return await service.page(wanted)


@router.get("/runs/{run_id}", tags=["runs"])
async def get_run(service: Of, run_id: RunId) -> RunDocument:
    """A run with its rounds, prompts, candidates, critiques, rewards and feedback."""
    return await service.run(run_id)


@router.get("/runs/{run_id}/bundle", tags=["runs"], responses=_ZIP, response_class=Response)
async def get_bundle(service: Of, run_id: RunId) -> Response:
    """The run as pages that open from disk, with its pictures inside: a ZIP file."""
    await service.events(run_id)
    metadata = service.settings.traces.metadata
    data = await asyncio.to_thread(zipped, service.store, [run_id], metadata)
    return Response(data, media_type="application/zip", headers={"Content-Disposition": "attachment"})


@router.get("/runs/{run_id}/events", tags=["runs"])
async def list_events(service: Of, run_id: RunId, after: Cursor = 0) -> EventPage:
    """The run's raw events, in the order of commits."""
    found = [event for event in await service.events(run_id) if event.cursor > after]
    items = found[:_EVENTS]
    return EventPage(items=items, next=items[-1].cursor if len(found) > len(items) else None)


@router.get(
    "/runs/{run_id}/watch",
    tags=["runs"],
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "`id` is the event's cursor, `event` its type, `data` the event as JSON. An event "
            "`state` without an id says how the run stands. The stream ends with the run.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The run has ended and all of it was seen: do not connect again."},
    },
)
async def watch_run(
    service: Of,
    run_id: RunId,
    after: Cursor = 0,
    last_event_id: LastEvent = None,
) -> Response:
    """Watch a run: its events as they are committed, as server-sent events."""
    seen = after if last_event_id is None else last_event_id
    now = await service.state(run_id)
    if (
        now in ENDED
        and last_event_id is not None
        and not await asyncio.to_thread(service.store.events, run_id, seen)
    ):
        return Response(status_code=204)

    async def messages() -> AsyncIterator[bytes]:
        async for events, state in watched(service, run_id, seen, now):
            said = [ServerSentEvent(it.model_dump_json(), event=it.type, id=str(it.cursor)) for it in events]
            if state is not None:
                said.append(ServerSentEvent(state, event="state"))
            if said:  # at once: with many watchers most of the time goes into sending
                yield b"".join(it.encode() for it in said)

    return stream(messages())


@router.post("/runs/{run_id}/cancel", status_code=202, tags=["runs"])
async def cancel_run(service: Of, run_id: RunId) -> RunSummary:
    """Stop working on a run. What is done stays; `resume` goes on."""
    await service.cancel(run_id)
    return await _summary(service, run_id)


@router.post("/runs/{run_id}/resume", status_code=202, tags=["runs"])
async def resume_run(service: Of, run_id: RunId) -> RunSummary:
    """Go on with a run that stopped or failed."""
    await service.resume(run_id)
    return await _summary(service, run_id)


@router.post("/runs/{run_id}/review", status_code=202, tags=["runs"])
async def answer_review(service: Of, run_id: RunId, answer: Answer) -> RunSummary:
    """Answer the review that a run waits for; `question` of the run is what it asks."""
    await service.resume(run_id, answer)
    return await _summary(service, run_id)


@router.post("/runs/{run_id}/feedback", status_code=201, tags=["runs"])
async def give_feedback(service: Of, run_id: RunId, feedback: Feedback) -> Said:
    """Rate a picture, correct what it makes one feel, mark it, or comment."""
    return await service.say(run_id, feedback)


@router.post("/runs/{run_id}/images/{sha256}/again", tags=["images"])
async def make_again(service: Of, run_id: RunId, sha256: Address) -> Again:
    """Make a picture of a run again from its recipe, and say whether the pixels agree; nothing is logged."""
    return await service.again(run_id, sha256)


@router.post("/playground", tags=["playground"])
async def play(service: Of, wanted: Play) -> list[Played]:
    """One pass of the distilled model and one of its base, or of another one, side by side; nothing is logged."""
    return await service.play(wanted)


Name = Annotated[str, Path(pattern="^j-[0-9a-f]{20}$", examples=[f"j-{'0' * 20}"])]


@router.post("/jobs", status_code=202, tags=["jobs"])
async def start_job(
    service: Of, wanted: JobRequest, response: Response, idempotency_key: Key = None
) -> JobDocument:
    """Start a distillation, an evaluation, a collection or a training, as a process of its own."""
    job = await asyncio.to_thread(service.jobs.start, wanted, idempotency_key)
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job


@router.get("/jobs", tags=["jobs"])
async def list_jobs(service: Of) -> list[JobDocument]:
    """All jobs, the newest first."""
    return await asyncio.to_thread(service.jobs.list)


@router.get("/jobs/{job_id}", tags=["jobs"])
async def get_job(service: Of, job_id: Name) -> JobDocument:
    """A job as it stands."""
    return await asyncio.to_thread(service.jobs.get, job_id)


@router.post("/jobs/{job_id}/cancel", status_code=202, tags=["jobs"])
async def cancel_job(service: Of, job_id: Name) -> JobDocument:
    """Stop a job. What it has saved stays; `resume` goes on."""
    return await asyncio.to_thread(service.jobs.cancel, job_id)


@router.post("/jobs/{job_id}/resume", status_code=202, tags=["jobs"])
async def resume_job(service: Of, job_id: Name) -> JobDocument:
    """Queue a job again that failed or was cancelled; it goes on from what it has saved."""
    return await asyncio.to_thread(service.jobs.resume, job_id)


@router.get(
    "/jobs/{job_id}/log",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "Lines of the log; `id` is how many bytes have been read. An event `state` without an id "
            "says how the job ended, and the stream ends with it.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def watch_job(
    service: Of,
    job_id: Name,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only what follows so many bytes.")] = 0,
    last_event_id: LastEvent = None,
) -> Response:
    """Read a job's log as it is written, as server-sent events."""
    await asyncio.to_thread(service.jobs.get, job_id)
    seen = after if last_event_id is None else last_event_id

    async def messages() -> AsyncIterator[ServerSentEvent]:
        async for read, text in service.jobs.log(job_id, seen):
            yield ServerSentEvent(text.removesuffix("\n"), event="log", id=str(read))
        yield ServerSentEvent((await asyncio.to_thread(service.jobs.get, job_id)).state, event="state")

    return stream(messages())


@router.get("/jobs/{job_id}/metrics", tags=["jobs"])
async def get_metrics(service: Of, job_id: Name) -> list[dict[str, float]]:
    """Figures of a training, a step each."""
    return await asyncio.to_thread(service.jobs.metrics, job_id)


@router.get("/jobs/{job_id}/report", tags=["jobs"], response_class=HTMLResponse)
async def get_report(service: Of, job_id: Name) -> Response:
    """The report of an evaluation: one page, whole in itself."""
    page = await asyncio.to_thread(service.jobs.report, job_id)
    return HTMLResponse(page, headers={"Content-Security-Policy": _REPORT})


@router.get("/jobs/{job_id}/samples/{step}", tags=["jobs"], responses=_PNG, response_class=Response)
async def get_sample(service: Of, job_id: Name, step: Annotated[int, Path(ge=0, lt=10**7)]) -> Response:
    """A sheet of pictures that a training made at a step."""
    return Response(await asyncio.to_thread(service.jobs.sample, job_id, step), media_type="image/png")


def _forever(data: bytes, media_type: str, etag: str, known: str | None) -> Response:
    headers = {**FOREVER, "ETag": f'"{etag}"'}
    if known is not None and f'"{etag}"' in known:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


@router.get("/images/{sha256}", tags=["images"], responses=_PNG | _NOT_MODIFIED, response_class=Response)
async def get_image(
    service: Of, sha256: Address, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """A picture, as it was made, with its recipe."""
    metadata = service.settings.traces.metadata
    data = await asyncio.to_thread(images.picture, service.store, sha256, metadata)
    return _forever(data, "image/png", hashlib.sha256(data).hexdigest(), if_none_match)


@router.get(
    "/images/{sha256}/thumbnail", tags=["images"], responses=_WEBP | _NOT_MODIFIED, response_class=Response
)
async def get_thumbnail(
    service: Of,
    sha256: Address,
    side: Annotated[
        Literal["96", "192", "384", "768"], Query(description="Pixels at most, each way.")
    ] = "192",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A small copy of a picture."""
    data = await asyncio.to_thread(images.thumbnail, service.store.blobs, sha256, int(side))
    return _forever(data, "image/webp", f"{sha256[:32]}-{side}", if_none_match)


@health.get("/healthz")
async def alive() -> dict[str, str]:
    """The server answers."""
    return {"status": "ok"}


@health.get("/metrics", response_class=Response, responses=_media("text/plain"))
async def metrics(service: Of) -> Response:
    """What Prometheus scrapes: runs, pictures, tokens, seconds, queue, requests."""
    data = await asyncio.to_thread(service.figures)
    return Response(data, media_type="text/plain; version=1.0.0; charset=utf-8")


@health.get("/readyz")
async def ready(service: Of) -> dict[str, str]:
    """The log can be read and the models are loaded."""
    await asyncio.to_thread(service.held)
    if not service.ready:
        raise Unavailable("the models are not loaded (yet)")
    return {"status": "ok"}
