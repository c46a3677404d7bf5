"""`emoloop eval` and `emoloop doctor`: words in, one call, exit code out. Only typer loads before a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..domain import UserError
from . import options as opt

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SUITE | compare A B", help="A shipped suite, a YAML file, or `compare` and two reports."
    ),
]


def eval_(
    context: typer.Context,
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report.  [default: eval-SUITE]")] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Arms, separated by commas: names, NAME=pkg.mod:function, NAME=ADAPTER-FOLDER."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KEY=VALUE,…", help="One more arm: the loop with these settings; repeatable."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="law, lvlm[:MODEL], clip:ENCODER,HEAD, human:FILE.csv, or pkg.mod:Class."),
    ] = None,
    guard: Annotated[str | None, typer.Option(help="Second reader; the same words.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Artifact behind the arms NAME and loop_on_NAME, by default adapter; repeatable.",
        ),
    ] = None,
    critic: Annotated[
        str | None, typer.Option(metavar="MODEL", help="LVLM behind the arms NAME+critic.")
    ] = None,
    model: opt.Model = None,
    lvlm: opt.Lvlm = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N neutral prompts.")] = None,
    processes: Annotated[
        str, typer.Option(help="How many processes share the work; auto is one for each GPU.")
    ] = "1",
    engine: opt.Engine = "local",
    allow_reward_judge: Annotated[
        bool,
        typer.Option(
            "--allow-reward-judge", help="Let a judge speak that gave the reward; the report says so."
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Read a suite that this release was read on before; the ledger says so."
        ),
    ] = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Judge arms on a suite, with intervals and equal budgets, and write a report; or compare two reports."""
    if not words:
        from ..evals.suites import shipped

        raise UserError(f"name a suite: {', '.join(shipped())}, or a YAML file")
    if words[0] == "compare":
        if len(words) != 3:
            raise UserError("emoloop eval compare wants two reports: folders or report.json files")
        _compare(words[1], words[2], as_json)
        return
    if len(words) > 1:
        raise UserError(f"one suite at a time: {words[1]!r} is too much")
    from rich.console import Console

    from ..evals.document import Options
    from ..evals.evaluate import evaluate
    from .evals_view import show

    options = Options(
        suite=words[0],
        arms=[arm.strip() for arm in arms.split(",") if arm.strip()] if arms else None,
        more_arms=arm or [],
        judge=judge,
        guard=guard,
        adapters=dict(map(_named, adapter or [])),
        critic=critic,
        allow_reward_judge=allow_reward_judge,
        limit=limit,
        again=again,
        # `--adapter` is an arm here, not a setting of every arm.
        settings=opt.overrides({**context.params, "adapter": None}),
    )
    folder = out or Path(f"eval-{Path(words[0]).stem}")
    try:
        with opt.bars(Console(stderr=True), opt.COUNT) as progress:
            document, _ = evaluate(options, folder, progress, _processes(processes), engine=engine)
    except KeyboardInterrupt:
        print("emoloop: interrupted; what is made is kept, the same call goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    opt.tell(document, as_json, lambda: show(document, folder))


def _named(words: str) -> tuple[str, Path]:
    name, given, folder = words.partition("=")
    return (name, Path(folder)) if given else ("adapter", Path(words))


def _processes(words: str) -> int:
    if words == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not words.isdecimal() or int(words) < 1:
        raise UserError(f"--processes {words}: a number from 1, or auto")
    return int(words)


def _compare(first: str, second: str, as_json: bool) -> None:
    from ..evals.compare import compare, load_report
    from .evals_view import show_comparison

    document = compare(load_report(Path(first)), load_report(Path(second)))
    opt.tell(document, as_json, lambda: show_comparison(document))


def doctor(as_json: opt.AsJson = False) -> None:
    """Say what is installed, found and reachable, which settings hold, and what to do about the rest."""
    from ..doctor import examine
    from .evals_view import show_doctor

    document = examine()
    opt.tell(document, as_json, lambda: show_doctor(document))
    raise typer.Exit(0 if document["ok"] else 1)
