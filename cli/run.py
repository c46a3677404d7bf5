"""`emoloop run` and `emoloop collect`. Only typer loads before a verb runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import EmotionTarget, RunResult, RunStatus, UserError, read_target

if TYPE_CHECKING:
    from rich.console import Console

    from ..graph.loop import Loop
    from ..settings import Settings

#: What a shell expects of a program that Ctrl-C ended.
_INTERRUPTED = 130

#: What a run keeps from its beginning.
_OPTIONS = ("rounds", "images", "tolerance", "patience")

_MODELS, _LOOP, _OUTPUT = "Models", "Loop", "Output"

Home = Annotated[
    Path | None, typer.Option(help="Folder of log, pictures and checkpoints.", rich_help_panel=_OUTPUT)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT)
]
Model = Annotated[
    str | None,
    typer.Option(help="Generator: a preset, a diffusers folder, a hub id.", rich_help_panel=_MODELS),
]
Adapter = Annotated[str | None, typer.Option(help="LoRA or distilled adapter.", rich_help_panel=_MODELS)]
AdapterScale = Annotated[
    float | None, typer.Option(help="How strongly the adapter speaks.", rich_help_panel=_MODELS)
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_MODELS)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=_MODELS)]
Lvlm = Annotated[
    str | None,
    typer.Option(
        help="LVLM: a preset, folder or hub id; a server's URL; or an engine: embedded, vllm, vllm-offline.",
        rich_help_panel=_MODELS,
    ),
]
Rounds = Annotated[int | None, typer.Option(help="Most rounds.", rich_help_panel=_LOOP)]
Images = Annotated[int | None, typer.Option(help="Pictures in a round.", rich_help_panel=_LOOP)]
Tolerance = Annotated[
    float | None, typer.Option(help="How near to the target is reached, on each axis.", rich_help_panel=_LOOP)
]
Patience = Annotated[
    int | None, typer.Option(help="Rounds without a better picture that end a run.", rich_help_panel=_LOOP)
]
Reward = Annotated[
    str | None, typer.Option(help="A name, or a path like my_pkg.my_mod:MyReward.", rich_help_panel=_LOOP)
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse prompts with words that the model does not know.", rich_help_panel=_LOOP
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as lvlm.timeout=60."),
]


def run(
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show.")] = None,
    valence: Annotated[float | None, typer.Option(help="Unpleasant (-3) to pleasant (3).")] = None,
    arousal: Annotated[float | None, typer.Option(help="Calm (-3) to stirred (3).")] = None,
    category: Annotated[
        str | None,
        typer.Option(
            "--category",
            "--emotion",
            help="amusement, awe, contentment, excitement, anger, disgust, fear or sadness.",
        ),
    ] = None,
    rounds: Rounds = None,
    images: Images = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes the run repeatable; drawn at random by default.", rich_help_panel=_LOOP),
    ] = None,
    tolerance: Tolerance = None,
    patience: Patience = None,
    reward: Reward = None,
    review: Annotated[
        bool, typer.Option("--review", help="Ask before each rewrite.", rich_help_panel=_LOOP)
    ] = False,
    strict: Strict = False,
    model: Model = None,
    adapter: Adapter = None,
    adapter_scale: AdapterScale = None,
    steps: Steps = None,
    guidance: Guidance = None,
    lvlm: Lvlm = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help='Go on with a run (its id, its beginning, or "last").')
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for best picture, contact sheet and trace.", rich_help_panel=_OUTPUT),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
    set_: Set = None,
) -> None:
    """Make a picture that shows PROMPT and makes people feel what is wanted."""
    overrides = _overrides(locals())
    if resume is not None:
        asked = {
            "PROMPT": prompt,
            "--valence": valence,
            "--arousal": arousal,
            "--category": category,
            "--seed": seed,
            # Those of --set as well.
            **{f"--{name}": overrides["loop"].get(name) for name in _OPTIONS},
            "--review": review or overrides["loop"].get("review"),
        }
        for named, value in asked.items():
            if value is not None and value is not False:
                raise UserError(f"--resume goes on with what the run was asked for: leave out {named}")
        settings, name = _settings_of(resume, overrides)
        code = _asyncio(_run(settings, None, None, None, name, True, out, as_json, False))
    else:
        from ..graph.state import read_prompt, read_seed
        from ..settings import load_settings

        if prompt is None:
            raise UserError(
                'say what the picture should show: emoloop run "a dog by the sea" --valence 2 --arousal -1'
            )
        text = read_prompt(prompt)
        seed = read_seed(seed)
        target = read_target({"valence": valence, "arousal": arousal, "category": category})
        settings = load_settings(overrides)
        from ..graph.nodes import new_run_id

        code = _asyncio(_run(settings, text, target, seed, new_run_id(), False, out, as_json, review))
    raise typer.Exit(code)


def collect(
    source: Annotated[Path, typer.Argument(metavar="PROMPTS.jsonl", help="One request a line.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.", rich_help_panel=_LOOP)] = 8,
    rounds: Rounds = None,
    images: Images = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Lines without a seed get one from this.", rich_help_panel=_LOOP)
    ] = 0,
    tolerance: Tolerance = None,
    patience: Patience = None,
    reward: Reward = None,
    strict: Strict = False,
    model: Model = None,
    adapter: Adapter = None,
    adapter_scale: AdapterScale = None,
    steps: Steps = None,
    guidance: Guidance = None,
    lvlm: Lvlm = None,
    failed: Annotated[
        Path | None,
        typer.Option(help="Where lines go that fail; default PROMPTS.failed.jsonl.", rich_help_panel=_OUTPUT),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
    set_: Set = None,
) -> None:
    """Run every line of a file: {"prompt": …, "valence": …, "arousal": …, "category": …}.

    Stop it at any time: the same command goes on where it broke off, and tries again what failed.
    """
    from ..graph.collect import count_lines
    from ..settings import load_settings

    settings = load_settings(_overrides(locals()))
    total = count_lines(source)
    if total == 0:
        raise UserError(f"{source} has no lines: one JSON object a line is wanted")
    letters = failed if failed is not None else source.with_name(f"{source.stem}.failed.jsonl")
    raise typer.Exit(_asyncio(_collect(settings, source, letters, total, seed, concurrency, as_json)))


# ---- run


async def _run(
    settings: Settings,
    prompt: str | None,
    target: EmotionTarget | None,
    seed: int | None,
    run_id: str,
    resume: bool,
    out: Path | None,
    as_json: bool,
    review: bool,
) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    folder = out if out is not None else Path("emoloop-runs") / run_id
    _check_folder(folder)
    began = time.monotonic()
    loop = _open(settings, console)
    async with loop:
        loading = time.monotonic() - began
        console.print(f"[dim]models loaded in {loading:.0f} s[/]", highlight=False)
        again = f"emoloop run --resume {run_id}{_home_flag(settings)}"
        try:
            result = await _watched(loop, console, prompt, target, seed, run_id, resume, review)
        except asyncio.CancelledError:
            if await _exists(loop, run_id):
                console.print(f"stopped and saved; go on with:  {again}", highlight=False, soft_wrap=True)
            raise
        except UserError:
            raise
        except Exception as error:
            from ..agents.ask import one_line

            console.print(f"emoloop: run {run_id} broke off: {one_line(error)}", style="red", markup=False)
            console.print(f"what is done is saved; go on with:  {again}", highlight=False, soft_wrap=True)
            if os.environ.get("EMOLOOP_DEBUG"):
                raise
            return 1
        files = await asyncio.to_thread(_leave, loop, result, folder)
    if as_json:
        from ..traces.reader import result_json

        print(json.dumps({**result_json(result), "files": files}, ensure_ascii=False))
    from .view import show_result

    show_result(console, result, files, time.monotonic() - began - loading)
    if result.status is RunStatus.INTERRUPTED:
        console.print(
            f"the run waits for a review; go on, in a terminal, with:  {again}",
            highlight=False,
            soft_wrap=True,
        )
    if result.status is RunStatus.FAILED:
        reason = result.warnings[-1] if result.warnings else result.stop_reason
        console.print(f"emoloop: run {run_id} failed: {reason}", style="red", markup=False, soft_wrap=True)
        console.print(f"try what failed again with:  {again}", highlight=False, soft_wrap=True)
        return 1
    return 0


async def _watched(
    loop: Loop,
    console: Console,
    prompt: str | None,
    target: EmotionTarget | None,
    seed: int | None,
    run_id: str,
    resume: bool,
    review: bool,
) -> RunResult:
    from .view import RunView

    with RunView(console) as view:

        async def ask(wanted: dict[str, Any]) -> Any:
            view.__exit__(None, None, None)
            answer = await asyncio.to_thread(_ask, console, wanted)
            view.__enter__()
            return answer

        reviewer = ask if sys.stdin.isatty() else None
        if resume:
            return await loop.resume(run_id, on_progress=view, reviewer=reviewer)
        assert prompt is not None and target is not None
        return await loop.run(
            prompt,
            target,
            seed=seed,
            run_id=run_id,
            on_progress=view,
            reviewer=reviewer,
            **({"review": True} if review else {}),
        )


def _ask(console: Console, wanted: dict[str, Any]) -> Any:
    best = wanted.get("best") or {}
    if best.get("image"):
        console.print(f"  best so far: {best['image']}", highlight=False, soft_wrap=True)
    console.print("  Enter: go on.  Text: tell the rewriter.  =text: use that prompt.  q: stop here.")
    answer = console.input("  > ").strip()
    if answer == "q":
        return {"stop": True}
    if answer.startswith("="):
        return {"prompt": answer[1:].strip()} if answer[1:].strip() else {}
    return {"comment": answer} if answer else {}


def _leave(loop: Loop, result: RunResult, folder: Path) -> dict[str, str]:
    """Write what a person opens: best picture, contact sheet, trace."""
    from ..tools.images.sheet import save_sheet
    from ..traces.exchange.export import export_jsonl
    from ..traces.rows import RunFilter

    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    if result.best is not None and result.best.path is not None:
        files["image"] = str(shutil.copyfile(result.best.path, folder / "best.png"))
    if any(round.candidates for round in result.rounds):
        files["sheet"] = str(save_sheet(result, folder / "sheet.png"))
    trace = folder / "trace.jsonl"
    with trace.open("w", encoding="utf-8") as file:
        export_jsonl(loop.recorder.store, RunFilter(run_ids=(result.run_id,)), file)
    return {**files, "trace": str(trace)}


# ---- collect


async def _collect(
    settings: Settings, source: Path, letters: Path, total: int, seed: int, concurrency: int, as_json: bool
) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..graph.collect import Outcome, collect

    console = Console(stderr=True)
    done = {"completed": 0, "already": 0, "failed": 0, "images": 0}
    began = time.monotonic()
    async with _open(settings, console) as loop:
        console.print(f"[dim]models loaded in {time.monotonic() - began:.0f} s[/]", highlight=False)
        began = time.monotonic()
        bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[red]{task.fields[failures]}[/]"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )
        task = bar.add_task("", total=total, rate="", failures="")

        def note(outcome: Outcome) -> None:
            kind = "failed" if outcome.error is not None else "already" if outcome.known else "completed"
            done[kind] += 1
            done["images"] += 0 if outcome.known else outcome.images
            made = done["completed"] + done["failed"]
            rate = f"{made / (time.monotonic() - began) * 60:.1f} runs/min" if made else ""
            failures = f"{done['failed']} failed" if done["failed"] else ""
            bar.update(task, advance=1, rate=rate, failures=failures)
            if outcome.error is not None:
                bar.console.print(
                    f"line {outcome.line}: {outcome.error}", style="yellow", markup=False, soft_wrap=True
                )

        try:
            with bar:
                await collect(loop, source, letters, seed=seed, concurrency=concurrency, on_outcome=note)
        except asyncio.CancelledError:
            console.print("stopped and saved; the same command goes on", highlight=False)
            raise
    seconds = time.monotonic() - began
    summary = {
        **done,
        "lines": total,
        "seconds": round(seconds, 1),
        "failed_file": str(letters) if done["failed"] else None,
        "home": str(loop.settings.home.expanduser().absolute()),
    }
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    before = f", {done['already']} were there" if done["already"] else ""
    console.print(
        f"{done['completed']} runs completed{before}, {done['images']} images, {seconds:.0f} s",
        highlight=False,
    )
    if done["failed"]:
        console.print(
            f"[yellow]{done['failed']} failed[/]: see {letters}; the same command tries them again",
            soft_wrap=True,
        )
    return 0 if done["completed"] + done["already"] else 1


# ---- shared


def _overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Command line options as settings, nested by section."""
    from ..settings import lvlm_settings, merged

    generator = {k: given.get(k) for k in ("model", "adapter", "adapter_scale", "steps", "guidance")}
    if given["strict"]:
        generator["strict"] = True
    loop = {k: given.get(k) for k in ("rounds", "images", "tolerance", "patience", "reward")}
    overrides: dict[str, Any] = {"home": given["home"], "generator": generator, "loop": loop}
    if given["lvlm"] is not None:
        overrides["lvlm"] = lvlm_settings(given["lvlm"])
    for word in given["set_"] or ():
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--set {word}: KEY=VALUE is wanted, such as lvlm.timeout=60")
        nested: Any = _value(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merged(overrides, nested)
    return overrides


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _settings_of(run: str, overrides: dict[str, Any]) -> tuple[Settings, str]:
    """The settings that a run began with, under what the command line says, and its full id."""
    from ..events import RunStarted
    from ..settings import Settings, load_settings, merged, pruned
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
    plain = Settings.model_construct()
    known: dict[str, Any] = {}
    for section, values in logged.items():
        # Defaults stay defaults: a model's own settings hold only where nobody has set anything.
        usual = getattr(plain, section).model_dump(mode="json")
        known[section] = {key: value for key, value in values.items() if usual.get(key, ...) != value}
    return load_settings(merged(known, pruned(overrides))), name


def _open(settings: Settings, console: Console) -> Loop:
    # The libraries' advice is for their own users; what matters here is said by us.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from ..graph.loop import open_loop

    console.print("[dim]loading models …[/]", highlight=False)
    return open_loop(settings)


async def _exists(loop: Loop, run_id: str) -> bool:
    return bool(await loop.recorder.events(run_id))


def _home_flag(settings: Settings) -> str:
    import shlex

    from ..settings import Settings as Plain

    default = Plain.model_fields["home"].default
    return "" if settings.home == default else f" --home {shlex.quote(str(settings.home))}"


def _check_folder(folder: Path) -> None:
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write to {folder}: {parent} is a file (choose another with --out)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {parent} (choose another with --out)")


def _asyncio(work: Coroutine[Any, Any, int]) -> int:
    async def with_signals() -> int:
        task = asyncio.current_task()
        assert task is not None
        with suppress(NotImplementedError):  # Windows has no such signal to listen to
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(with_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _INTERRUPTED
