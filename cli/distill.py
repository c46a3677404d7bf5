"""The verb `emoloop distill`: parse, show, call `distill.distill`. Nothing heavy is imported at the top."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..domain import UserError
from . import options as opt

if TYPE_CHECKING:
    from ..rl.config import DistillConfig
    from ..settings import Settings
    from ..traces.rows import RunFilter


def distill(
    objective: Annotated[
        str,
        typer.Argument(
            help="opd, direct, dpo, contrast, npo, nft, rwr, sft, or a dotted path (my_pkg.my_mod:MyObjective)."
        ),
    ],
    out: opt.Artifact = None,
    where: opt.Where = None,
    resume: opt.GoOn = False,
    dry_run: Annotated[bool, typer.Option(help="Show what the log holds and train nothing.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="miniature, sd15, sdxl, flux-dev or sd35-medium; default from the model that made the images."
        ),
    ] = None,
    config: opt.Config = None,
    sets: opt.Knobs = None,
    print_config: opt.PrintConfig = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Train the diffusion weights on logged runs, so that one pass gives what the loop gave."""
    from ..rl.config import commented, load_config
    from ..settings import load_settings

    settings = load_settings({"home": home})
    wanted = opt.read_where(where)
    if out is None and not dry_run and not print_config:
        raise UserError("distill needs --out DIR (or --dry-run)")
    if preset is None:
        preset = _preset(settings, wanted, config, print_config)
    resolved = load_config(objective, preset, config, sets or [])
    if print_config:
        typer.echo(commented(resolved), nl=False)
    elif dry_run or out is None:
        _preview(settings, resolved, preset, wanted, as_json)
    else:
        _train(settings, resolved, out, wanted, resume, as_json)


def _preset(settings: Settings, where: RunFilter, config: Path | None, may_lack: bool) -> str | None:
    """The preset for the model that made the images; for the one that would, where the log may lack."""
    from ..api import logged_model, preset_for

    try:
        model = logged_model(settings, where)
    except UserError:
        if not may_lack:
            raise
        model = settings.generator.model
    found = preset_for(model, config)
    said = f"no preset fits {model}: taking {config} over the defaults"
    typer.echo(f"preset {found}, for images by {model}" if found else said, err=True)
    return found


def _train(
    settings: Settings, config: DistillConfig, out: Path, where: RunFilter, resume: bool, as_json: bool
) -> None:
    from rich.console import Console

    from ..rl.distill import distill as run

    console = Console(stderr=True)

    def shown(figures: dict[str, float]) -> str:
        return f"loss {figures['loss']:.4f}  {figures['seconds']:.2f} s/step"

    with opt.training(console, f"distill {config.objective['name']}", config.train.steps, shown) as watch:
        result = run(
            settings, config, out, where, resume=resume, watch=watch,
            warn=lambda note: opt.say(console, f"note: {note}", "yellow"),
        )  # fmt: skip
    opt.tell_trained(result, as_json, console)


def _preview(
    settings: Settings, config: DistillConfig, preset: str | None, where: RunFilter, as_json: bool
) -> None:
    """Counts, histograms and some examples: what a person should see before spending hours."""
    from rich.console import Console

    from ..rl.data.dataset import Dataset
    from ..rl.distill import objective_of
    from ..rl.rollouts import LogRollouts
    from ..traces.store import open_store
    from .traces_view import target_text

    _, source = objective_of(config)
    with open_store(settings, read_only=True) as store:
        dataset = Dataset(LogRollouts(store, where), config.data)
        statistics = dataset.statistics
        examples = dataset.examples(source)
        if as_json:
            document = {
                "preset": preset,
                "source": source,
                "base": dataset.base._asdict(),
                "reward": dict(zip(("name", "version"), dataset.reward, strict=True)),
                "data": statistics.model_dump(mode="json"),
                "config": config.model_dump(mode="json"),
            }
            opt.print_json(document)
            return
        say = partial(opt.say, Console())
        base = dataset.base
        say(
            f"{statistics.runs} runs of {statistics.prompts} prompts, {statistics.images} images by {base.model}; "
            f"{statistics.rewarded} rewards ({dataset.reward[0]} v{dataset.reward[1]}), {statistics.missing} missing"
        )
        for name, counts in statistics.sources.items():
            mark = " ← this objective" if name == source else ""
            say(f"  {name:12} {counts['train']:>8} train {counts['held_out']:>8} held out{mark}")
        if statistics.dropped:
            why = ", ".join(f"{count} × {reason}" for reason, count in statistics.dropped.items())
            say(f"no pair from: {why}")
        if statistics.phrasebook:
            say(f"phrases (readings expected within {max(statistics.reader_error or (0, 0)):.2f}):")
            for phrase, count in statistics.phrasebook.items():
                say(f"  {count:6} × {phrase}")
        for name in ("gains", "rewards", "valence", "arousal"):
            histogram = getattr(statistics, name)
            _bars(say, name.removesuffix("s"), histogram.edges, histogram.counts)
        say("examples:")
        for it in examples.fetch(range(min(5, len(examples)))):
            line = f"  {it.prompt!r} → {target_text(it.target)}"
            if it.refined is not None:
                line += f"  refined {it.refined!r}  gain {it.advantage:+.2f}"
            if it.kind is not None:
                line += f"  {it.kind}: {str(it.winner)[:10]} over {str(it.loser)[:10]}"
            if it.reward is not None:
                line += f"  reward {it.reward:+.2f} in a group of {len(it.rewards)}"
            say(line)
        say(f"data hash {statistics.data_hash[:16]}")


def _bars(say: Callable[[str], None], title: str, edges: list[float], counts: list[int]) -> None:
    if not any(counts):
        return
    levels = " ▁▂▃▄▅▆▇█"
    top = max(counts)
    bars = "".join(levels[-(-count * 8 // top)] for count in counts)
    say(f"  {title:8} {edges[0]:+.1f} {bars} {edges[-1]:+.1f}")
