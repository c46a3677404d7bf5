"""`emoloop traces …`: thin verbs over the store. Only typer loads before a verb runs."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..domain import Emotion, EmotionTarget, UserError

if TYPE_CHECKING:
    from ..settings import Settings
    from ..traces.rows import RunFilter
    from ..traces.store import TraceStore

app = typer.Typer(help="The log: list, show, export, remove, replay, rebuild.", no_args_is_help=True)

#: Lines of `list` unless `--limit` says otherwise.
_LINES = 50

Home = Annotated[Path | None, typer.Option(help="Folder of the log; default from the settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Out = Annotated[Path | None, typer.Option(help="File or folder; jsonl goes to stdout without it.")]
Run = Annotated[str, typer.Argument(help='Run id, its beginning, or "last".')]
Runs = Annotated[list[str], typer.Argument(help='Run ids, their beginnings, or "last".')]
SomeRuns = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Only these runs.")]
Range = tuple[float, float]


def _conditions(
    *,
    status: Annotated[
        Literal["running", "completed", "failed"] | None, typer.Option(help="How the run stands.")
    ] = None,
    category: Annotated[
        Emotion | None, typer.Option("--emotion", "--category", help="Wanted category.")
    ] = None,
    valence: Annotated[Range | None, typer.Option(metavar="LOW HIGH", help="Wanted valence.")] = None,
    arousal: Annotated[Range | None, typer.Option(metavar="LOW HIGH", help="Wanted arousal.")] = None,
    min_gain: Annotated[float | None, typer.Option(help="At least this gain.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Part of the neutral prompt, in any case.")] = None,
    model: Annotated[str | None, typer.Option(help="Made by this model id or folder.")] = None,
    adapter: Annotated[str | None, typer.Option(help='Adapter hash or its beginning, or "none".')] = None,
    since: Annotated[
        str | None, typer.Option(help="2026-01-31, 2026-01-31T12:00, or 30m, 12h, 7d ago.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the newest.")] = None,
) -> dict[str, Any]:
    given: dict[str, Any] = {**locals(), "since": None if since is None else _moment(since)}
    return {name: value for name, value in given.items() if value is not None}


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_conditions`; what the user chose reaches it as `where`."""
    own, shared = (inspect.signature(each, eval_str=True).parameters for each in (command, _conditions))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        where = _conditions(**{name: given.pop(name) for name in shared})
        command(**given, where=where)

    # typer goes by the signature, and wants the annotations to agree with it.
    options = [each for each in own.values() if each.name != "where"] + list(shared.values())
    call.__annotations__ = {each.name: each.annotation for each in options}
    call.__dict__["__signature__"] = inspect.Signature(options)
    return call


@app.command("list")
@_filtered
def list_(*, where: dict[str, Any], home: Home = None, as_json: AsJson = False) -> None:
    """List runs, newest first."""
    with _store(home) as (store, _):
        limit = where.setdefault("limit", _LINES)
        rows = store.runs(_filter(store, None, where))
        if as_json:
            _print({"home": str(store.home), "runs": [row.model_dump(mode="json") for row in rows]})
            return
        from rich.console import Console

        from .traces_view import show_runs

        show_runs(Console(), rows)
        if len(rows) == limit:
            typer.echo(f"The newest {limit}; --limit shows more.", err=True)


@app.command()
def show(run: Run, home: Home = None, as_json: AsJson = False) -> None:
    """Show a run: its rounds, prompts, critiques and rewards."""
    from ..traces.reader import load_run, result_json

    with _store(home) as (store, _):
        result = load_run(store, store.resolve(run))
        if as_json:
            _print(result_json(result))
            return
        from rich.console import Console

        from .traces_view import show_run

        show_run(Console(), result)


@app.command()
@_filtered
def export(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="jsonl (events), pickapic (preference pairs) or reflection (verl-omni's trajectories).",
        ),
    ],
    runs: SomeRuns = None,
    *,
    where: dict[str, Any],
    out: Out = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Export runs for other tools."""
    from ..traces.exchange.export import FORMATS, export_jsonl

    known = ("jsonl", *FORMATS)
    if format not in known:
        raise UserError(f"unknown export format {format!r}; known: {', '.join(known)}")
    if out is None and (format != "jsonl" or as_json):
        raise UserError(f"exporting {format} {'with --json ' if as_json else ''}needs --out")
    with _store(home) as (store, _):
        chosen = _filter(store, runs, where)
        if out is None:
            export_jsonl(store, chosen, sys.stdout)
            return
        if format == "jsonl":
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", encoding="utf-8") as file:
                count = export_jsonl(store, chosen, file)
        else:
            count = FORMATS[format](store, chosen, out)
    if as_json:
        _print({"format": format, "out": str(out), "count": count})
    else:
        typer.echo(f"{count} {'events' if format == 'jsonl' else 'pairs'} in {out}", err=True)


@app.command()
def rm(
    runs: Runs,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Delete runs: their events, and the images that no other run has."""
    with _store(home, write=True) as (store, _):
        chosen = store.runs(_filter(store, runs, {}))
        if not yes:
            for row in chosen:
                going = " (not finished: something may still be writing it)" if row.finished is None else ""
                typer.echo(f"{row.run_id}  {row.images} images  {row.prompt[:60]}{going}", err=True)
            typer.confirm(f"Delete {_many(len(chosen), 'run')}?", abort=True, err=True)
        events, files = store.remove(*(row.run_id for row in chosen))
    if as_json:
        _print({"removed": [row.run_id for row in chosen], "events": events, "files": files})
    else:
        parts = _many(len(chosen), "run"), _many(events, "event"), _many(files, "file")
        typer.echo(f"deleted {', '.join(parts)}", err=True)


@app.command()
@_filtered
def replay(
    runs: SomeRuns = None,
    *,
    where: dict[str, Any],
    endpoint: Annotated[str | None, typer.Option(help="OTLP endpoint; default from the settings.")] = None,
    content: Annotated[bool, typer.Option(help="Put prompts and answers on the spans.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild OpenTelemetry spans from the log and send them, with their original times."""
    from ..traces import spans as telemetry

    given = {"otlp_endpoint": endpoint, "capture_content": content or None}
    with _store(home, traces=given) as (store, settings):
        spans, chosen = 0, store.runs(_filter(store, runs, where))
        capture = settings.traces.capture_content
        exporter = telemetry.open_exporter(settings.traces)
        try:
            for row in chosen:
                events = store.events(row.run_id)
                spans += telemetry.replay(events, exporter, store.blobs, capture_content=capture)
        finally:
            exporter.shutdown()
    if as_json:
        _print({"runs": [row.run_id for row in chosen], "spans": spans})
    else:
        typer.echo(f"sent {_many(spans, 'span')} of {_many(len(chosen), 'run')}", err=True)


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(help="Parquet in the pick-a-pic schema, or the folder of an export.")
    ],
    valence: Annotated[float | None, typer.Option(help="Wanted valence of rows that name no target.")] = None,
    arousal: Annotated[float | None, typer.Option(help="Wanted arousal of rows that name no target.")] = None,
    emotion: Annotated[Emotion | None, typer.Option(help="Wanted category of such rows.")] = None,
    model: Annotated[str | None, typer.Option(help="What made the images: the model to train.")] = None,
    home: Home = None,
) -> None:
    """Add preference pairs from elsewhere to the log."""
    from pydantic import ValidationError

    from ..traces.exchange.intake import import_pickapic

    target = None
    if (valence, arousal, emotion) != (None, None, None):
        try:
            target = EmotionTarget(valence=valence, arousal=arousal, category=emotion)
        except ValidationError as error:
            raise UserError(f"the target: {error.errors()[0]['msg']}") from error
    with _store(home, write=True) as (store, _):
        typer.echo(
            f"took {_many(import_pickapic(store, path, target=target, model=model), 'pair')}", err=True
        )


@app.command()
def rebuild(home: Home = None) -> None:
    """Make the tables behind the lists again from the events; brings an older log up to date."""
    with _store(home, write=True) as (store, _):
        store.rebuild()
        typer.echo(f"rebuilt {_many(len(store.runs()), 'run')} from their events", err=True)


@contextmanager
def _store(
    home: Path | None, *, write: bool = False, traces: dict[str, Any] | None = None
) -> Iterator[tuple[TraceStore, Settings]]:
    from ..settings import load_settings
    from ..traces.store import StoreError, open_store

    settings = load_settings({"home": home, "traces": traces or {}})
    try:
        with open_store(settings, read_only=not write) as store:
            yield store, settings
    except BrokenPipeError:
        raise  # click knows what `… | head` means
    except (StoreError, OSError) as error:
        typer.echo(f"emoloop: {error}", err=True)
        raise typer.Exit(1) from error


def _filter(store: TraceStore, names: list[str] | None, where: dict[str, Any]) -> RunFilter:
    from ..traces.rows import RunFilter

    return RunFilter(run_ids=tuple(map(store.resolve, names)) if names else None, **where)


def _moment(text: str) -> datetime:
    if ago := re.fullmatch(r"(\d+)([mhd])", text):
        unit = {"m": "minutes", "h": "hours", "d": "days"}[ago[2]]
        return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UserError(
            f"--since {text!r} is no time: 2026-01-31, 2026-01-31T12:00, 30m, 12h or 7d"
        ) from None


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _print(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
