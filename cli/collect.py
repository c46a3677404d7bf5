"""`emoloop collect`. Only typer loads before a verb runs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import UserError
from . import options as opt
from .run import open_models, run_async

if TYPE_CHECKING:
    from rich.console import Console

    from ..settings import Settings


def collect(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="PROMPTS.jsonl", help="One request a line; - is standard input.")
    ],
    concurrency: Annotated[
        int,
        typer.Option(min=0, help="Runs at a time in a process; 0 leaves all to `emoloop worker`."),
    ] = 8,
    engine: opt.Engine = "local",
    targets: Annotated[
        str | None,
        typer.Option(
            help="Run each line without a target for all of these: categories, valence/arousal: fear,2/-1"
        ),
    ] = None,
    rounds: opt.Rounds = None,
    images: opt.Images = None,
    proposals: opt.Proposals = None,
    seed: Annotated[int, typer.Option(min=0, help="Lines without a seed get one from this.")] = 0,
    tolerance: opt.Tolerance = None,
    patience: opt.Patience = None,
    reward: opt.Reward = None,
    strict: opt.Strict = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    adapter_scale: opt.AdapterScale = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    lvlm: opt.Lvlm = None,
    failed: Annotated[
        Path | None, typer.Option(help="Where lines go that fail; default PROMPTS.failed.jsonl.")
    ] = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Run every line of a file: {"prompt": …, "valence": …, "arousal": …, "category": …}.

    Stop it at any time: the same command goes on where it broke off, and tries again what failed.
    """
    from ..graph.collect import count_lines
    from ..graph.targets import read_targets, with_targets
    from ..settings import load_settings

    if targets is not None:
        source = with_targets(source, read_targets(targets))
    settings = load_settings(opt.overrides(context.params))
    if str(source) == "-":
        source, failed = Path("/dev/stdin"), failed or Path("collect.failed.jsonl")
    # A pipe is read once.
    total = count_lines(source) if source.is_file() or not source.exists() else None
    if total == 0:
        raise UserError(f"{source} has no lines: one JSON object a line is wanted")
    letters = failed if failed is not None else source.with_name(f"{source.stem}.failed.jsonl")
    if engine == "ray":
        from ..graph.ray_workers import start_ray

        if not concurrency:
            raise UserError("--engine ray: give its actors runs, --concurrency 1 or more")
        start_ray()  # sets its own answer to signals, so it comes first
    how = partial(_working, settings, engine, source, letters, seed=seed, concurrency=concurrency)
    raise typer.Exit(run_async(_collect(settings, how, letters, total, as_json)))


@asynccontextmanager
async def _working(
    settings: Settings, engine: str, *paths: Path, console: Console, **options: Any
) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """What collects, once its models are open."""
    if engine == "ray":
        from ..graph.ray_workers import collect_on_ray

        yield partial(collect_on_ray, settings, *paths, **options)
        return
    from ..graph.collect import collect

    async with open_models(settings, console) as loop:
        yield partial(collect, loop, *paths, **options)


async def _collect(settings: Settings, working: Any, letters: Path, total: int | None, as_json: bool) -> int:
    from rich.console import Console

    from ..graph.collect import Outcome

    console = Console(stderr=True)
    done = Counter({"completed": 0, "already": 0, "failed": 0, "images": 0})
    async with working(console=console) as collecting:
        began = time.monotonic()
        texts = (
            opt.COUNT if total else "{task.completed}",
            "{task.fields[rate]}",
            "[red]{task.fields[failures]}[/]",
        )
        bar = opt.bars(console, *texts, speed_estimate_period=600)
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
                opt.say(bar.console, f"line {outcome.line}: {outcome.error}", "yellow")

        try:
            with bar:
                await collecting(on_outcome=note)
        except asyncio.CancelledError:
            opt.say(console, "stopped and saved; the same command goes on")
            raise
    seconds = time.monotonic() - began
    summary = {
        **done,
        "lines": done["completed"] + done["already"] + done["failed"],
        "seconds": round(seconds, 1),
        "failed_file": str(letters) if done["failed"] else None,
        "home": str(settings.home),
    }
    if as_json:
        opt.print_json(summary)
    before = f", {done['already']} were there" if done["already"] else ""
    opt.say(console, f"{done['completed']} runs completed{before}, {done['images']} images, {seconds:.0f} s")
    if done["failed"]:
        opt.say(
            console, f"{done['failed']} failed: see {letters}; the same command tries them again", "yellow"
        )
    return 0 if done["completed"] + done["already"] else 1
