"""The pages: lists, runs, candidates, comparisons, as HTML.

Forms post here and are answered with another page, so that all of it works without a script; htmx makes the same
addresses live. What a page shows is the API's document of it.
"""

from __future__ import annotations

import hmac
import secrets
from asyncio import to_thread
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar, get_args
from urllib.parse import urlencode

from anyio import sleep
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import BaseModel, ValidationError
from sse_starlette import ServerSentEvent

from ..domain import UserError
from ..evals.suites import shipped
from ..traces.queue import ENDED
from .access import COOKIE, session
from .api import Name, Of, RunId, stream
from .documents import Answer, Feedback, Listing, Play, RunDocument, RunRequest, Shot
from .errors import NotFound
from .jobs import DistillJob, JobRequest, adapters, critics
from .templates import Links, Side, curves, differences, render
from .work import Service, watched

#: Seconds between two pictures of a page that changes.
_LIVE, _LIST = 0.3, 1.0

T = TypeVar("T", bound=BaseModel)

router = APIRouter(default_response_class=HTMLResponse)

_links = Links()


def _read(model: type[T], given: Mapping[str, Any]) -> T:
    """A form as a document; a field that was left empty was not given."""
    try:
        return model.model_validate(
            {key: value for key, value in given.items() if value not in ("", None, {})}
        )
    except ValidationError as error:
        # As if FastAPI had read it: the same answer.
        raise RequestValidationError(
            [{**it, "loc": ("body", *it["loc"])} for it in error.errors()]
        ) from error


async def _form(request: Request) -> dict[str, Any]:
    return {key: value for key, value in (await request.form()).items() if isinstance(value, str)}


@router.get("/")
async def runs(service: Of, request: Request) -> str:
    """The list."""
    given = dict(request.query_params)
    like = await service.run(given.pop("like")) if given.get("like") else None
    view = given.pop("view", "")
    wanted = _read(Listing, given)
    page = await service.page(wanted)
    kept = {key: value for key, value in given.items() if value and key != "after"}
    views = {name: f"/?{urlencode({**kept, 'view': name} if name else kept)}" for name in ("", "gallery")}
    kept |= {"view": view} if view else {}
    return render(
        "runs.html.jinja",
        page=page,
        wanted=wanted,
        view=view,
        views=views,
        labels=await service.labels(),
        asked=_asked(service, like),
        key=secrets.token_hex(8),
        here_url=f"/?{urlencode(kept)}",
        first_url=f"/?{urlencode(kept)}",
        next_url=f"/?{urlencode({**kept, 'after': page.next})}",
    )


def _asked(service: Service, like: RunDocument | None) -> dict[str, Any]:
    """What the form for a new run begins with: the settings, or another run's request."""
    if like is None:
        loop = service.settings.loop.model_dump(include={"rounds", "images", "review"})
        return {
            "prompt": "",
            "valence": 2,
            "arousal": -1,
            "category": None,
            "seed": None,
            "proposals": None,
            **loop,
        }
    kept = like.settings.get("loop", {})
    loop = {key: kept.get(key) for key in ("rounds", "images", "review", "proposals")}
    return {**like.run.model_dump(include={"prompt", "valence", "arousal", "category", "seed"}), **loop}


@router.get("/live")
async def runs_live(service: Of) -> Response:
    """Says that the list has changed, once a second at most."""

    async def messages() -> AsyncIterator[ServerSentEvent]:
        async with aclosing(service.feed.follow(service.feed.cursor)) as batches:
            async for _ in batches:
                yield ServerSentEvent("", event="news")
                await sleep(_LIST)

    return stream(messages())


@router.post("/runs")
async def start(service: Of, request: Request) -> Response:
    """Start a run and show it."""
    given = await _form(request)
    key = given.pop("key", None)
    axes = ("valence", "arousal", "category")
    target = {name: value for name in axes if (value := given.pop(name, ""))}
    wanted = _read(RunRequest, {**given, "target": target, "review": given.get("review") == "true"})
    return RedirectResponse(_links.run(await service.start(wanted, key)), 303)


@router.get("/runs/{run_id}")
async def run(service: Of, run_id: RunId) -> str:
    """A run."""
    return render("run.html.jinja", run=await service.run(run_id))


@router.get("/runs/{run_id}/live")
async def run_live(service: Of, run_id: RunId, request: Request, after: int = 0) -> Response:
    """The run as it changes: the whole of what is shown, which the page merges into itself."""
    seen = request.headers.get("last-event-id", "")
    cursor = int(seen) if seen.isdigit() else after
    now = await service.state(run_id)

    async def messages() -> AsyncIterator[ServerSentEvent]:
        async with aclosing(watched(service, run_id, cursor, now)) as batches:
            async for _ in batches:
                shown = await service.run(run_id)
                yield ServerSentEvent(render("_run.html.jinja", run=shown), id=str(shown.cursor))
                await sleep(_LIVE)
        yield ServerSentEvent("", event="ended")

    return stream(messages())


@router.post("/runs/{run_id}/cancel")
async def cancel(service: Of, run_id: RunId) -> Response:
    """Stop working on it."""
    await service.cancel(run_id)
    return RedirectResponse(_links.run(run_id), 303)


@router.post("/runs/{run_id}/resume")
async def resume(service: Of, run_id: RunId) -> Response:
    """Go on with it."""
    await service.resume(run_id)
    return RedirectResponse(_links.run(run_id), 303)


@router.post("/runs/{run_id}/review")
async def review(service: Of, run_id: RunId, request: Request) -> Response:
    """Answer its review."""
    await service.resume(run_id, _read(Answer, await _form(request)))
    return RedirectResponse(_links.run(run_id), 303)


async def _shot(service: Service, run_id: str, number: int, index: int, whole: bool) -> str:
    run = await service.run(run_id)
    shot, page = _found(run, number, index), "shot.html.jinja" if whole else "_shot.html.jinja"
    return render(page, run=run, shot=shot, **run.beside(run.shots.index(shot)))


def _found(run: RunDocument, number: int, index: int) -> Shot:
    """A candidate of a run."""
    for shot in run.shots:
        if (shot.round, shot.index) == (number, index):
            return shot
    raise NotFound(f"run {run.run.run_id!r} has no picture {index} in round {number}")


def _by_htmx(request: Request) -> bool:
    return request.headers.get("hx-request") == "true"


@router.get("/runs/{run_id}/{number}/{index}")
async def shot(service: Of, run_id: RunId, number: int, index: int, request: Request) -> str:
    """A candidate: by itself, or as the sheet of its run's page."""
    return await _shot(service, run_id, number, index, not _by_htmx(request))


@router.post("/runs/{run_id}/{number}/{index}/again")
async def again(service: Of, run_id: RunId, number: int, index: int, request: Request) -> str:
    """Make a candidate's picture again, and show both."""
    run = await service.run(run_id)
    shot = _found(run, number, index)
    made = await service.again(run_id, shot.sha256 or "")
    page = "_again.html.jinja" if _by_htmx(request) else "again.html.jinja"
    return render(page, run=run, shot=shot, made=made)


@router.post("/runs/{run_id}/{number}/{index}/feedback")
async def feedback(service: Of, run_id: RunId, number: int, index: int, request: Request) -> Response:
    """Take what a person says of a candidate."""
    shot = _found(await service.run(run_id), number, index)
    await service.say(run_id, _said(await _form(request), shot.labels, sha256=shot.sha256))
    if not _by_htmx(request):
        return RedirectResponse(f"{_links.run(run_id)}/{number}/{index}", 303)
    return HTMLResponse(
        await _shot(service, run_id, number, index, whole=False), headers={"HX-Trigger": "said"}
    )


@router.post("/runs/{run_id}/feedback")
async def run_feedback(service: Of, run_id: RunId, request: Request) -> Response:
    """Take what a person says of the run."""
    run = await service.run(run_id)
    await service.say(run_id, _said(await _form(request), run.labels))
    return RedirectResponse(_links.run(run_id), 303)


def _said(form: dict[str, Any], labels: list[str], **about: Any) -> Feedback:
    """A form as feedback. Labels stand between commas: those that are there already are not said again."""
    given = form.pop("labels", None)
    if given is not None:
        given = list(dict.fromkeys(filter(None, map(str.strip, given.split(",")))))
    return _read(Feedback, {**form, **about, "labels": None if given == labels else given})


@router.get("/compare")
async def compare(service: Of, request: Request) -> str:
    """Two runs side by side, or two rounds: `run` is a run's id, or that and a round's number (`ID/1`)."""
    names = request.query_params.getlist("run")
    if len(names) != 2:
        raise UserError("choose two runs to compare")
    sides = []
    for name in names:
        run_id, slash, number = name.partition("/")
        run = await service.run(run_id)
        if slash and number not in [str(it.number) for it in run.rounds]:
            raise NotFound(f"run {run_id!r} has no round {number!r}")
        sides.append(Side(run, int(number) if slash else None))
    return render("compare.html.jinja", sides=sides, differences=differences(*sides))


@router.get("/playground")
async def playground(service: Of, adapter: str = "") -> str:
    """A prompt and a point of the plane, answered in one pass."""
    jobs = adapters(await to_thread(service.jobs.list))
    return render("playground.html.jinja", own=service.playground.adapter, jobs=jobs, chosen=adapter)


@router.post("/playground")
async def play(service: Of, request: Request) -> str:
    """The answer: two pictures."""
    given = await _form(request)
    target = {name: given.pop(name, "") for name in ("valence", "arousal")}
    wanted = _read(Play, {**given, "target": {key: value for key, value in target.items() if value}})
    return render("_answer.html.jinja", played=await service.play(wanted), wanted=wanted)


@router.get("/jobs")
async def jobs(service: Of) -> str:
    """The jobs."""
    found = await to_thread(service.jobs.list)
    return render(
        "jobs.html.jinja",
        jobs=found,
        adapters=adapters(found),
        critics=critics(found),
        objectives=get_args(DistillJob.model_fields["objective"].annotation),
        suites=shipped(),
        key=secrets.token_hex(8),
    )


@router.post("/jobs")
async def start_job(service: Of, request: Request) -> Response:
    """Start a job and show it."""
    given = await _form(request)
    key = given.pop("key", None)
    for name in ("where", "arms"):
        if listed := [it.strip() for it in given.pop(name, "").split(",") if it.strip()]:
            given[name] = listed
    if "prompts" in given:
        target = {axis: given.pop(axis, "") for axis in ("valence", "arousal")}
        prompts = filter(None, map(str.strip, given.pop("prompts").splitlines()))
        given["lines"] = [{"prompt": prompt, "target": target} for prompt in prompts]
    wanted = _read(JobRequest, given)
    job = await to_thread(service.jobs.start, wanted, key)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _job(service: Service, job_id: str) -> dict[str, Any]:
    """What a job's page shows."""
    return {
        "job": service.jobs.get(job_id),
        "curves": curves(service.jobs.metrics(job_id)),
        "log": service.jobs.tail(job_id),
    }


@router.get("/jobs/{job_id}")
async def job(service: Of, job_id: Name) -> str:
    """A job."""
    return render("job.html.jinja", **await to_thread(_job, service, job_id))


@router.get("/jobs/{job_id}/live")
async def job_live(service: Of, job_id: Name) -> Response:
    """The job as it changes: the whole of what is shown, which the page merges into itself."""
    await to_thread(service.jobs.get, job_id)

    async def messages() -> AsyncIterator[ServerSentEvent]:
        shown = ""
        while True:
            about = await to_thread(_job, service, job_id)
            if (now := render("_job.html.jinja", **about)) != shown:
                yield ServerSentEvent(now)
                shown = now
            if about["job"].state in ENDED and not about["job"].held:
                break
            await sleep(_LIST)
        yield ServerSentEvent("", event="ended")

    return stream(messages())


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(service: Of, job_id: Name) -> Response:
    """Stop it."""
    await to_thread(service.jobs.cancel, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.post("/jobs/{job_id}/resume")
async def resume_job(service: Of, job_id: Name) -> Response:
    """Go on with it."""
    await to_thread(service.jobs.resume, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.get("/login")
async def login_page() -> str:
    """Asks for the token."""
    return render("login.html.jinja", wrong=False)


@router.post("/login")
async def login(service: Of, request: Request) -> Response:
    """Let a browser in that knows the token."""
    token = service.settings.service.token or ""
    if not hmac.compare_digest((await _form(request)).get("token", "").encode(), token.encode()):
        return HTMLResponse(render("login.html.jinja", wrong=True), 401)
    answer = RedirectResponse("/", 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, session(token), httponly=True, samesite="strict", secure=secure, max_age=30 * 86400
    )
    return answer
