"""`emoloop worker` and `emoloop queue`. Only typer loads before a verb runs."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import UserError
from . import options as opt
from .run import open_models, run_async

if TYPE_CHECKING:
    from ..settings import Settings

#: Failed entries that `queue` names, the newest.
_FAILURES = 10


def worker(
    context: typer.Context,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 8,
    empty: Annotated[bool, typer.Option("--until-empty", help="End when nothing waits any more.")] = False,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Start jobs of the service here too, `service.jobs` at a time.")
    ] = False,
    rounds: opt.Rounds = None,
    images: opt.Images = None,
    proposals: opt.Proposals = None,
    tolerance: opt.Tolerance = None,
    patience: opt.Patience = None,
    reward: opt.Reward = None,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    adapter_scale: opt.AdapterScale = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    lvlm: opt.Lvlm = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Do the runs that `collect` has queued in the log, on this machine or another, until it is stopped.

    It takes the runs that were queued with the same models and loop. SIGTERM or Ctrl-C: take no more and finish
    what is under way; a second time: give it back and stop, so that another worker goes on with it.
    """
    from ..settings import load_settings

    settings = load_settings(opt.overrides(context.params))
    raise typer.Exit(run_async(_worker(settings, concurrency, empty, jobs, as_json)))


async def _worker(settings: Settings, concurrency: int, empty: bool, jobs: bool, as_json: bool) -> int:
    from rich.console import Console

    from ..graph.collect import fingerprint
    from ..graph.worker import Worker
    from ..service.jobs import Jobs

    console = Console(stderr=True)
    done = {"completed": 0, "failed": 0}

    def note(item: Any, error: str | None) -> None:
        done["failed" if error else "completed"] += 1
        if error:
            opt.say(console, f"run {item.id}: {error}", "yellow")

    async with open_models(settings, console) as loop:
        needs = fingerprint(loop, 0)
        worker = Worker(loop, concurrency=concurrency, needs=needs, until_empty=empty, on_done=note)
        waiting = await asyncio.to_thread(loop.recorder.store.queue.waiting)
        others = sum(count for wanted, count in waiting.items() if wanted not in (needs, None))
        if others:
            opt.say(console, f"queued for other models or loop settings: {others}", "yellow")
        _drain_at_signals(worker, console)
        async with Jobs(settings, loop.recorder.store) if jobs else nullcontext():
            await worker.work()
    if as_json:
        opt.print_json(done)
    opt.say(console, f"{done['completed']} runs completed, {done['failed']} failed")
    return 0


def _drain_at_signals(worker: Any, console: Any) -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def stop(number: signal.Signals) -> None:
        opt.say(console, "finishing what is under way; once more gives it back")
        worker.drain()
        loop.add_signal_handler(number, give_back, number)

    def give_back(number: signal.Signals) -> None:
        task.cancel()
        loop.add_signal_handler(number, os._exit, 130)

    with suppress(NotImplementedError):  # Windows has no such signals to listen to
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)


def queue(
    pause: Annotated[bool, typer.Option("--pause", help="Let all workers take nothing.")] = False,
    go_on: Annotated[bool, typer.Option("--go-on", help="Let them take again.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Runs under way among all workers; 0 lifts the limit.")
    ] = None,
    requeue: Annotated[bool, typer.Option("--requeue-failed", help="Queue again what failed.")] = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Show what waits and runs, with the time left; pause, limit or repeat it while workers are at work."""
    from ..settings import load_settings
    from ..traces.queue import Control
    from ..traces.store import open_store

    if pause and go_on:
        raise UserError("--pause or --go-on, not both")
    with open_store(load_settings(opt.overrides({"home": home, "set_": set_}))) as store:
        now = store.queue.control()
        paused = pause or (now.paused and not go_on)
        wanted = Control(paused, now.limit if limit is None else limit or None)
        if wanted != now:
            store.queue.steer(wanted)
        if requeue:
            store.queue.requeue()
        counts, rate = store.queue.counts(), store.queue.rate()
        failed = store.queue.items(states=("failed",), limit=_FAILURES)
    left = sum(counts.get("run", {}).get(state, 0) for state in ("queued", "running"))
    document = {
        "entries": counts,
        "paused": wanted.paused,
        "limit": wanted.limit,
        "runs_per_minute": round(60 * rate, 2),
        "seconds_left": round(left / rate) if rate and left else None,
        "failures": [{"id": item.id, "error": item.error} for item in failed],
    }
    opt.tell(document, as_json, lambda: _show(document))


def job(job_id: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Supervise one job of the service: hold its lease, run its command, write how it ended."""
    from ..service.supervise import supervise
    from ..settings import load_settings
    from ..traces.store import open_store

    with open_store(load_settings()) as store:
        supervise(store, job_id)


def _show(document: dict[str, Any]) -> None:
    for kind, counts in document["entries"].items():
        print(f"{kind:12}", "  ".join(f"{count} {state}" for state, count in counts.items() if count))
    if not document["entries"]:
        print("the queue is empty")
    if document["paused"]:
        print("paused: emoloop queue --go-on")
    if document["limit"] is not None:
        print(f"at most {document['limit']} runs under way")
    if document["seconds_left"] is not None:
        print(f"{document['runs_per_minute']:g} runs/min, {document['seconds_left'] / 60:.0f} min left")
    for failure in document["failures"]:
        print(f"failed {failure['id']}: {failure['error']}")
