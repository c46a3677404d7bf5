"""`emoloop rewrite`: a rewriter alone. Only typer loads before a verb runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..domain import read_target
from . import options as opt
from .run import run_async

if TYPE_CHECKING:
    from ..graph.rewriting import Rewriting


def rewrite(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    valence: opt.Valence = None,
    arousal: opt.Arousal = None,
    category: opt.Category = None,
    rewriter: Annotated[
        str | None, typer.Option(help="simple, mc_agent, or a path like my_pkg.my_mod:MyRewriter.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=256, help="How many different prompts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Draws personas, and several prompts.")] = 0,
    lvlm: opt.Lvlm = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Rewrite PROMPT so that its picture makes people feel what is wanted; nothing is painted or logged."""
    from ..graph.rewriting import rewrite as ask
    from ..settings import load_settings, merged

    given = opt.overrides(context.params)
    settings = load_settings(merged(given, {"loop": {"rewriter": rewriter}} if rewriter else {}))
    target = read_target({"valence": valence, "arousal": arousal, "category": category})
    written: Rewriting | None = None

    async def work() -> int:
        nonlocal written
        written = await ask(prompt, target, settings, count=count, seed=seed)
        return 0

    code = run_async(work())
    if written is not None:
        found = written
        opt.tell(found.model_dump(mode="json", exclude_none=True), as_json, lambda: _show(found))
    raise typer.Exit(code)


def _show(found: Rewriting) -> None:
    from rich.console import Console

    from .traces_view import show_drafts

    console = Console()
    show_drafts(console, found.drafts)
    for one in found.proposals:
        opt.say(console, one.prompt, "bold")
        for words in filter(None, (one.changes, one.why)):
            opt.say(console, f"  {words}", "dim")
    for warning in found.warnings:
        opt.say(console, f"warning: {warning}", "yellow")
