"""`emoloop run` and `emoloop resume`. Only typer loads before a verb runs."""

from __future__ import annotations

import asyncio
import gc
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..domain import EmotionTarget, RunResult, RunStatus, UserError, read_target
from ..events import RunStarted
from ..files import check_writable, write_atomic
from ..traces.document import result_json
from . import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from ..graph.loop import Loop
    from ..settings import Settings

#: What a shell expects of a program that Ctrl-C ended.
_INTERRUPTED = 130

#: What a run keeps from its beginning.
_KEPT = ("rounds", "images", "proposals", "tolerance", "patience", "review")


def run(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show.")] = None,
    valence: opt.Valence = None,
    arousal: opt.Arousal = None,
    category: opt.Category = None,
    rounds: opt.Rounds = None,
    images: opt.Images = None,
    proposals: opt.Proposals = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes the run repeatable; drawn at random by default.")
    ] = None,
    tolerance: opt.Tolerance = None,
    patience: opt.Patience = None,
    reward: opt.Reward = None,
    review: Annotated[bool, typer.Option("--review", help="Ask before each rewrite.")] = False,
    strict: opt.Strict = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    adapter_scale: opt.AdapterScale = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    lvlm: opt.Lvlm = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run; the same as `emoloop resume RUN`.")
    ] = None,
    out: opt.Out = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Make a picture that shows PROMPT and makes people feel what is wanted."""
    overrides = opt.overrides(context.params)
    if review:
        overrides["loop"] = {**overrides.get("loop", {}), "review": True}
    if resume is not None:
        asked = {"PROMPT": prompt, "--valence": valence, "--arousal": arousal, "--category": category}
        for named, value in {**asked, "--seed": seed}.items():
            if value is not None:
                raise UserError(f"--resume goes on with what the run was asked for: leave out {named}")
        _resume(resume, overrides, out, as_json)
    from ..graph.state import new_run_id, read_prompt, read_seed
    from ..settings import load_settings

    if prompt is None:
        raise UserError(
            'say what the picture should show: emoloop run "a dog by the sea" --valence 2 --arousal -1'
        )
    request = (
        read_prompt(prompt),
        read_target({"valence": valence, "arousal": arousal, "category": category}),
        read_seed(seed),
    )
    raise typer.Exit(run_async(_run(load_settings(overrides), request, new_run_id(), out, as_json)))


def resume(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RUN", help='Run id, its beginning, or "last".')],
    lvlm: opt.Lvlm = None,
    out: opt.Out = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Go on with a run that broke off, failed or waits for a review, with the settings that it began with."""
    _resume(name, opt.overrides(context.params), out, as_json)


def _resume(name: str, overrides: dict[str, Any], out: Path | None, as_json: bool) -> NoReturn:
    for key in _KEPT:
        if overrides.get("loop", {}).get(key) is not None:
            raise UserError(f"--resume goes on with what the run was asked for: leave out --{key}")
    settings, run_id = settings_of(name, overrides)
    raise typer.Exit(run_async(_run(settings, None, run_id, out, as_json)))


async def _run(
    settings: Settings,
    request: tuple[str, EmotionTarget, int | None] | None,
    run_id: str,
    out: Path | None,
    as_json: bool,
) -> int:
    """Run a request, or go on with a run where there is none, and leave its files."""
    from rich.console import Console

    from ..agents.ask import one_line
    from .view import show_result

    console = Console(stderr=True)
    say = partial(opt.say, console)
    folder = out if out is not None else Path("emoloop-runs") / run_id
    check_writable(folder, "--out", "choose another with --out")
    again = f"emoloop run --resume {run_id}{_home_flag(settings)}"
    began = time.monotonic()
    async with open_models(settings, console) as loop:
        loading = time.monotonic() - began
        try:
            result = await _watched(loop, console, request, run_id)
        except asyncio.CancelledError:
            if await loop.recorder.events(run_id):
                say(f"stopped and saved; go on with:  {again}")
            raise
        except UserError:
            raise
        except Exception as error:
            say(f"emoloop: run {run_id} broke off: {one_line(error)}", "red")
            say(f"what is done is saved; go on with:  {again}")
            if os.environ.get("EMOLOOP_DEBUG"):
                raise
            return 1
        try:
            files = await asyncio.to_thread(_leave, loop, result, folder)
        except OSError as error:
            say(f"emoloop: run {run_id} is in the log, but {folder} cannot be written: {error}", "red")
            say(f"write it elsewhere with:  {again} --out FOLDER")
            return 1
    if as_json:
        opt.print_json({**result_json(result), "files": files})
    show_result(console, result, files, time.monotonic() - began - loading)
    if result.status is RunStatus.INTERRUPTED:
        say(f"the run waits for a review; go on, in a terminal, with:  {again}")
    if result.status is RunStatus.FAILED:
        reason = result.warnings[-1] if result.warnings else result.stop_reason
        say(f"emoloop: run {run_id} failed: {reason}", "red")
        say(f"try what failed again with:  {again}")
        return 1
    return 0


async def _watched(
    loop: Loop, console: Console, request: tuple[str, EmotionTarget, int | None] | None, run_id: str
) -> RunResult:
    from .view import RunView

    with RunView(console) as view:

        async def ask(wanted: dict[str, Any]) -> Any:
            with view.paused():
                return await asyncio.to_thread(_ask, console, wanted)

        reviewer = ask if sys.stdin.isatty() else None
        if request is None:
            return await loop.resume(run_id, on_event=view, reviewer=reviewer)
        prompt, target, seed = request
        return await loop.run(prompt, target, seed=seed, run_id=run_id, on_event=view, reviewer=reviewer)


def _ask(console: Console, wanted: Mapping[str, Any]) -> Any:
    best = wanted.get("best") or {}
    if best.get("image"):
        opt.say(console, f"  best so far: {best['image']}")
    console.print("  Enter: go on.  Text: tell the rewriter.  =text: use that prompt.  q: stop here.")
    answer = console.input("  > ").strip()
    if answer == "q":
        return {"stop": True}
    key, words = ("prompt", answer[1:].strip()) if answer.startswith("=") else ("comment", answer)
    return {key: words} if words else {}


def _leave(loop: Loop, result: RunResult, folder: Path) -> dict[str, str]:
    """Write what a person opens: best picture, contact sheet, trace."""
    from ..tools.images.sheet import save_sheet
    from ..traces.exchange.export import export_jsonl
    from ..traces.recipe import dressed
    from ..traces.rows import RunFilter

    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    if result.best is not None and result.best.path is not None:
        carries = loop.parts.settings.traces.metadata
        data = dressed(loop.recorder.store, result.best.sha256, carries, result.run_id)
        files["image"] = str(write_atomic(folder / "best.png", data))
    if any(round.candidates for round in result.rounds):
        files["sheet"] = str(save_sheet(result, folder / "sheet.png"))
    trace = folder / "trace.jsonl"
    with trace.open("w", encoding="utf-8") as file:
        export_jsonl(loop.recorder.store, RunFilter(run_ids=(result.run_id,)), file)
    return {**files, "trace": str(trace)}


def settings_of(run: str, overrides: Mapping[str, Any]) -> tuple[Settings, str]:
    """The settings that a run began with, under what the command line says, and its full id.

    Raises:
        UserError: There is no such run, or it cannot be gone on with from the command line.
    """
    from ..settings import Settings, load_settings, merged
    from ..tools.urls import redact
    from ..traces.store import open_store

    settings = load_settings(overrides)
    with open_store(settings, read_only=True) as store:
        name = store.resolve(run)
        started = next((event for event in store.events(name) if isinstance(event, RunStarted)), None)
    logged = dict(started.settings) if started else {}
    if objects := logged.pop("objects", ()):
        raise UserError(
            f"run {name!r} used objects of a Python program ({', '.join(objects)}): resume it from there, "
            f"with `loop.resume({name!r})`"
        )
    if not logged or not set(logged) <= set(Settings.model_fields):
        raise UserError(f"run {name!r} was not begun by `emoloop run`: go on with it where it was made")
    plain = Settings.model_construct()
    known: dict[str, Any] = {}
    for section, values in logged.items():
        # Defaults stay defaults: a model's own settings hold only where nobody has set anything.
        usual = getattr(plain, section).model_dump(mode="json")
        known[section] = {key: value for key, value in values.items() if usual.get(key, ...) != value}
        for key, value in list(known[section].items()):
            # A password is not logged: an address that held one comes from the settings of now.
            if "://***@" in str(value):
                if redact(str(getattr(getattr(settings, section), key, ""))) != value:
                    raise UserError(
                        f"the run went by {section}.{key} {value}, whose password is not logged: give it again with "
                        f"--set {section}.{key}=URL"
                    )
                del known[section][key]
    return load_settings(merged(known, overrides)), name


@asynccontextmanager
async def open_models(settings: Settings, console: Console) -> AsyncIterator[Loop]:
    """An open loop, with a word about the wait."""
    # The libraries' advice is for their own users; what matters here is said by us.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    console.print("[dim]loading models …[/]", highlight=False)
    began = time.monotonic()
    # A million objects come with the libraries, and stay: looking through them meanwhile takes a fifth of the wait.
    gc.disable()
    try:
        from ..graph.loop import open_loop

        loop = await open_loop(settings).__aenter__()
        gc.freeze()
    finally:
        gc.enable()
    console.print(f"[dim]models loaded in {time.monotonic() - began:.0f} s[/]", highlight=False)
    try:
        yield loop
    finally:
        await loop.__aexit__()


def _home_flag(settings: Settings) -> str:
    home, here = settings.home, Path.cwd()
    if home == here / ".emoloop":
        return ""
    return f" --home {shlex.quote(str(home.relative_to(here) if home.is_relative_to(here) else home))}"


def run_async(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end. Ctrl-C and SIGTERM save and stop; a second one ends the process at once."""

    async def with_signals() -> int:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop(number: signal.Signals) -> None:
            task.cancel()
            # What waits for a batch under way cannot be cancelled; the log is whole at any moment.
            loop.add_signal_handler(number, os._exit, _INTERRUPTED)

        with suppress(NotImplementedError):  # Windows has no such signals to listen to
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop, number)
        return await work

    try:
        return asyncio.run(with_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _INTERRUPTED
