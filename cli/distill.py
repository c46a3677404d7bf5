"""The verb `emoloop distill`: parse, show, call `distill.distill`. Nothing heavy is imported at the top."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ..rl.config import DistillConfig
    from ..settings import Settings
    from ..traces.rows import RunFilter

#: Conditions of `--from` by name: the field of `RunFilter` that they set.
_CONDITIONS = {
    "run": "run_ids", "status": "status", "category": "category", "valence": "valence", "arousal": "arousal",
    "gain": "min_gain", "prompt": "prompt", "model": "model", "adapter": "adapter", "since": "since",
    "limit": "limit",
}  # fmt: skip


def distill(
    objective: Annotated[
        str, typer.Argument(help="opd, dpo, nft, rwr, sft, or a dotted path (my_pkg.my_mod:MyObjective).")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the artifact; made by this run.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="KEY=VALUE",
            help=f"Which runs; may be repeated. Keys: {', '.join(_CONDITIONS)}. Ranges as 0.5..2, since as 7d.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --out.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show what the log holds and train nothing.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="miniature or sd35-medium; default from the model that made the images."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file over the preset.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file: train.steps=200")
    ] = None,
    print_config: Annotated[
        bool, typer.Option(help="Print every knob with its value and meaning as YAML for --config, and stop.")
    ] = False,
    home: Annotated[Path | None, typer.Option(help="Folder of the log; default from the settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train the diffusion weights on logged runs, so that one pass gives what the loop gave."""
    from ..rl.config import commented, load_config
    from ..rl.trainer import DistillError
    from ..settings import load_settings
    from ..traces.store import StoreError

    settings = load_settings({"home": home})
    where = parse_filter(source or [])
    if out is None and not dry_run and not print_config:
        raise UserError("distill needs --out DIR (or --dry-run)")
    try:
        if preset is None:
            preset = _preset_for(_base_model(settings, where, print_config), config)
        resolved = load_config(objective, preset, config, sets or [])
        if print_config:
            typer.echo(commented(resolved), nl=False)
        elif dry_run or out is None:
            _preview(settings, resolved, where, as_json)
        else:
            _train(settings, resolved, out, where, resume, as_json)
    except (DistillError, StoreError, OSError) as error:
        typer.echo(f"emoloop: {error}", err=True)
        raise typer.Exit(1) from error


def parse_filter(conditions: list[str]) -> RunFilter:
    """The runs that `--from` names; conditions may stand in one word with commas between.

    Raises:
        UserError: Unknown condition or a value that does not parse.
    """
    from pydantic import ValidationError

    from ..traces.rows import RunFilter

    fields: dict[str, Any] = {}
    for item in (part for text in conditions for part in re.split(r",(?=\s*\w+=)", text)):
        key, sign, value = (part.strip() for part in item.partition("="))
        if not sign or key not in _CONDITIONS:
            raise UserError(f"--from {item.strip()!r}: want KEY=VALUE with one of {', '.join(_CONDITIONS)}")
        parsed: Any = value
        if key == "run":
            parsed = tuple(value.split("+"))
        elif key in ("valence", "arousal"):
            low, dots, high = value.partition("..")
            parsed = (low, high) if dots else (value, value)
        elif key == "since":
            parsed = _moment(value)
        fields[_CONDITIONS[key]] = parsed
    try:
        return RunFilter.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--from {first['loc'][0]}: {first['msg']} (got {first.get('input')!r})") from error


def _moment(text: str) -> datetime:
    if ago := re.fullmatch(r"(\d+)([mhd])", text):
        unit = {"m": "minutes", "h": "hours", "d": "days"}[ago[2]]
        return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UserError(f"--from since={text}: want 2026-01-31, 2026-01-31T12:00, 30m, 12h or 7d") from None


def _base_model(settings: Settings, where: RunFilter, may_lack: bool) -> str:
    """What the log says made the images; what would make them where the log may lack."""
    from ..rl.rollouts import origin
    from ..traces.store import open_store

    try:
        with open_store(settings, read_only=True) as store:
            return origin(store, where)[0].model
    except UserError:
        if may_lack:
            return settings.generator.model
        raise


def _preset_for(model: str, config: Path | None) -> str | None:
    """The preset for a model as the log names it: by a short name, a hub id or a folder.

    Raises:
        UserError: None fits, and no file gives the knobs either.
    """
    from ..rl.config import PRESETS
    from ..tools.presets import GENERATORS

    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    name = next((name for name, it in GENERATORS.items() if model in (name, str(it.model))), model)
    if name in known:
        typer.echo(f"preset {name}, for images by {model}", err=True)
        return name
    if config is None:
        raise UserError(
            f"no preset fits {model}, which made the images: name one by --preset ({', '.join(known)}) "
            "or give --config FILE"
        )
    typer.echo(f"no preset fits {model}: taking {config} over the defaults", err=True)
    return None


def _train(
    settings: Settings, config: DistillConfig, out: Path, where: RunFilter, resume: bool, as_json: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..rl.distill import distill as run

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} s/step"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=False) as progress:
        name = config.objective["name"]
        task = progress.add_task(f"distil {name}", total=config.train.steps, loss=float("nan"), rate=0.0)

        def watch(step: int, steps: int, figures: dict[str, float]) -> None:
            progress.update(task, completed=step, total=steps, loss=figures["loss"], rate=figures["seconds"])

        result = run(
            settings, config, out, where, resume=resume, watch=watch,
            warn=lambda note: console.print(f"[yellow]note:[/yellow] {escape(note)}"),
        )  # fmt: skip
    outcome = result.outcome
    if outcome.flags:
        console.print(f"[yellow]guards fell while the reward rose: {'; '.join(outcome.flags)}[/yellow]")
    if as_json:
        document = {
            "folder": str(result.folder),
            "steps": outcome.steps,
            "reason": outcome.reason,
            "flags": outcome.flags,
            "notes": result.notes,
            "data": result.statistics,
            "figures": result.figures,
        }
        typer.echo(json.dumps(document, indent=2))
    elif outcome.reason == "interrupted":
        console.print(f"interrupted at step {outcome.steps}; go on with --resume")
    else:
        console.print(f"{outcome.reason} after {outcome.steps} steps; use it: emoloop run … --adapter {out}")
    if outcome.reason == "interrupted":
        raise typer.Exit(130)


def _preview(settings: Settings, config: DistillConfig, where: RunFilter, as_json: bool) -> None:
    """Counts, histograms and some examples: what a person should see before spending hours."""
    from rich.console import Console

    from ..rl.data.dataset import Dataset
    from ..rl.data.examples import source_for
    from ..rl.distill import objective_of
    from ..rl.rollouts import LogRollouts
    from ..traces.store import open_store

    objective = objective_of(config)
    source = source_for(objective.required_keys, config.data)
    with open_store(settings, read_only=True) as store:
        dataset = Dataset(LogRollouts(store, where), config.data)
        statistics = dataset.statistics
        examples = dataset.examples(source)
        some = examples.fetch(range(min(5, len(examples))))
        if as_json:
            document = {
                "source": source,
                "base": dataset.base._asdict(),
                "reward": dict(zip(("name", "version"), dataset.reward, strict=True)),
                "data": statistics.model_dump(mode="json"),
                "config": config.model_dump(mode="json"),
            }
            typer.echo(json.dumps(document, indent=2))
            return
        console = Console()
        base = dataset.base
        console.print(f"[bold]{statistics.runs} runs[/bold] of {statistics.prompts} prompts, {statistics.images} "
                      f"images by {base.model}; {statistics.rewarded} rewards ({dataset.reward[0]} "
                      f"v{dataset.reward[1]}), {statistics.missing} missing")  # fmt: skip
        for name, counts in statistics.sources.items():
            mark = " ← this objective" if name == source else ""
            console.print(f"  {name:12} {counts['train']:>8} train {counts['held_out']:>8} held out{mark}")
        if statistics.dropped:
            console.print(
                "no pair from: " + ", ".join(f"{n} × {why}" for why, n in statistics.dropped.items())
            )
        if statistics.phrasebook:
            console.print(f"phrases (readings expected within {max(statistics.reader_error or (0, 0)):.2f}):")
            for phrase, count in statistics.phrasebook.items():
                console.print(f"  {count:6} × {phrase}", markup=False, highlight=False)
        for title, histogram in (("gain", statistics.gains), ("reward", statistics.rewards),
                                 ("valence", statistics.valence), ("arousal", statistics.arousal)):  # fmt: skip
            _bars(console, title, histogram.edges, histogram.counts)
        console.print("examples:")
        for it in some:
            numbers = [
                f"{axis} {value:+.1f}"
                for axis, value in zip("VA", it.target.point, strict=True)
                if value is not None
            ]
            line = f"  {it.prompt!r} → {' '.join(numbers)}"
            if it.refined is not None:
                line += f"  refined {it.refined!r}  gain {it.advantage:+.2f}"
            if it.kind is not None:
                line += f"  {it.kind}: {str(it.winner)[:10]} over {str(it.loser)[:10]}"
            if it.reward is not None:
                line += f"  reward {it.reward:+.2f} in a group of {len(it.rewards)}"
            console.print(line, markup=False, highlight=False)
        console.print(f"data hash {statistics.data_hash[:16]}")


def _bars(console: Console, title: str, edges: list[float], counts: list[int]) -> None:
    if not any(counts):
        return
    levels = " ▁▂▃▄▅▆▇█"
    top = max(counts)
    bars = "".join(levels[-(-count * 8 // top)] for count in counts)
    console.print(f"  {title:8} {edges[0]:+.1f} {bars} {edges[-1]:+.1f}", markup=False, highlight=False)
