"""The verbs `emoloop train …`: the papers' online stages. Nothing heavy is imported at the top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..domain import UserError
from . import options as opt

if TYPE_CHECKING:
    from ..domain import EmotionTarget

app = typer.Typer(
    help="The papers' online stages: the critic, and the generator by its word.", no_args_is_help=True
)


@app.command()
def critic(
    data: Annotated[
        Path | None,
        typer.Argument(help="Labelled pictures: a folder with metadata.*, or a published layout."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the trained model; made by this run.")] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Labelled pictures to measure by, before and after; nothing is chosen by them."),
    ] = None,
    resume: opt.GoOn = False,
    card: Annotated[
        bool, typer.Option("--card", help="Train nothing: the calibration card of the model on all of DATA.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="miniature, qwen25-vl-3b or qwen25-vl-7b; miniature where no --config is given."),
    ] = None,
    config: opt.Config = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file: grpo.steps=200")
    ] = None,
    print_config: opt.PrintConfig = False,
    as_json: opt.AsJson = False,
) -> None:
    """Teach the critic to read labelled pictures, by GRPO (extra `train`) after an optional supervised start."""
    from ..rl.critic.config import commented, load_critic_config

    resolved = load_critic_config(preset or (None if config else "miniature"), config, sets or [])
    if print_config:
        typer.echo(commented(resolved), nl=False)
        return
    if data is None:
        raise UserError("train critic needs DATA, a folder of labelled pictures")
    from rich.console import Console

    console = Console(stderr=True)
    if card:
        from ..rl.critic.train import card_of

        opt.print_json(card_of(resolved, data))
        return
    if out is None:
        raise UserError("train critic needs --out DIR")
    from ..rl.critic.train import train_critic

    def shown(figures: dict[str, float]) -> str:
        return "  ".join(f"{key} {figures[key]:.3f}" for key in ("loss", "reward") if key in figures)

    with opt.training(console, "train critic", resolved.steps, shown) as watch:
        done = train_critic(resolved, data, out, test=test, resume=resume, watch=watch)
    for flag in done.flags:
        opt.say(console, f"guard: {flag}", "yellow")
    if as_json:
        document = {"folder": str(out), "reason": done.reason, "flags": done.flags, "card": done.card}
        opt.print_json({**document, "figures": done.figures})
    elif done.reason == "interrupted":
        opt.say(console, "interrupted; go on with --resume")
    else:
        before, after = (done.figures.get(f"mae_{when}", float("nan")) for when in ("before", "after"))
        opt.say(
            console, f"{done.reason}: error {before:.3f} → {after:.3f}; use it: emoloop run … --lvlm {out}"
        )
    if done.reason == "interrupted":
        raise typer.Exit(130)


@app.command("flow-grpo")
def flow_grpo(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="Prompts and targets, as collect takes them; without it those of the log's runs."
        ),
    ] = None,
    out: opt.Artifact = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Artifact to start from; without it the base.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="KEY=VALUE", help="Which runs of the log; as of distill."),
    ] = None,
    resume: opt.GoOn = False,
    preset: Annotated[
        str | None, typer.Option(help="miniature, flux-dev or sd35-medium; default from the generator.")
    ] = None,
    config: opt.Config = None,
    sets: opt.Knobs = None,
    print_config: opt.PrintConfig = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Teach the generator by the critic's word on pictures that it makes meanwhile (Flow-GRPO)."""
    from ..rl.config import commented, load_config, preset_for
    from ..settings import load_settings

    settings = load_settings({"home": home})
    chosen = preset or preset_for(settings.generator.model, config)
    words = [*(sets or []), *([f"policy.previous={start}"] if start else [])]
    resolved = load_config("flow-grpo", chosen, config, words)
    if print_config:
        typer.echo(commented(resolved), nl=False)
        return
    if out is None:
        raise UserError("train flow-grpo needs --out DIR")
    from rich.console import Console

    from ..rl.online.train import logged_requests, train_flow_grpo

    requests = _requests(prompts) if prompts else logged_requests(settings, opt.read_where(where))
    console = Console(stderr=True)
    last: dict[str, float] = {}

    def shown(figures: dict[str, float]) -> str:
        last.update(figures)
        return "  ".join(f"{key} {last[key]:.4f}" for key in ("reward", "ratio", "kl") if key in last)

    with opt.training(console, "train flow-grpo", resolved.train.steps, shown) as watch:
        done = train_flow_grpo(
            settings, resolved, out, requests, resume=resume, watch=watch,
            warn=lambda note: opt.say(console, f"note: {note}", "yellow"),
        )  # fmt: skip
    opt.tell_trained(done, as_json, console)


def _requests(path: Path) -> list[tuple[str, EmotionTarget]]:
    from ..graph.collect import read_line, read_lines

    found = [read_line(number, text) for number, text in read_lines(path)]
    if not found:
        raise UserError(f"{path} holds no prompt")
    return [(it.prompt, it.target) for it in found]
