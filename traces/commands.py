"""`emoloop traces …`: thin verbs over the store. Only typer loads before a verb runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..emotion import Emotion, RunStatus, UserError

if TYPE_CHECKING:
    from ..settings import Settings
    from .rows import RunFilter
    from .store import TraceStore

app = typer.Typer(help="The log: list, show, export, remove, replay, rebuild.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option(help="Folder of the log; default from the settings.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Status = Annotated[RunStatus | None, typer.Option(help="How the run stands.")]
Category = Annotated[Emotion | None, typer.Option("--emotion", "--category", help="The wanted category.")]
Range = tuple[float, float]
Valence = Annotated[Range | None, typer.Option(metavar="LOW HIGH", help="Range of the wanted valence.")]
Arousal = Annotated[Range | None, typer.Option(metavar="LOW HIGH", help="Range of the wanted arousal.")]
MinGain = Annotated[float | None, typer.Option(help="At least this gain.")]
Prompt = Annotated[str | None, typer.Option(help="Part of the neutral prompt, in any case.")]
Since = Annotated[
    str | None, typer.Option(help="Started since: 2026-01-31, 2026-01-31T12:00, 30m, 12h or 7d ago.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many, the newest.")]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help='Run ids, their beginnings, or "last".')
]


@app.command("list")
def list_(
    status: Status = None,
    emotion: Category = None,
    valence: Valence = None,
    arousal: Arousal = None,
    min_gain: MinGain = None,
    prompt: Prompt = None,
    since: Since = None,
    limit: Limit = 50,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with _store(home) as (store, _):
        rows = store.runs(
            _filter(store, None, status, emotion, valence, arousal, min_gain, prompt, since, limit)
        )
        if as_json:
            _print({"home": str(store.home), "runs": [row.model_dump(mode="json") for row in rows]})
            return
        from rich.console import Console

        from .show import show_runs

        show_runs(Console(), rows)
        if limit is not None and len(rows) == limit:
            typer.echo(f"The newest {limit}; --limit shows more.", err=True)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help='Run id, its beginning, or "last".')],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show a run: its rounds, prompts, critiques and rewards."""
    from .reader import load_run, result_json

    with _store(home) as (store, _):
        result = load_run(store, store.resolve(run))
        if as_json:
            _print(result_json(result))
            return
        from rich.console import Console

        from .show import show_run

        show_run(Console(), result)


@app.command()
def export(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="jsonl (events) or pickapic (preference pairs).")
    ],
    runs: Names = None,
    out: Annotated[Path | None, typer.Option(help="File or folder; jsonl goes to stdout without it.")] = None,
    status: Status = None,
    emotion: Category = None,
    valence: Valence = None,
    arousal: Arousal = None,
    min_gain: MinGain = None,
    prompt: Prompt = None,
    since: Since = None,
    limit: Limit = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Export runs for other tools."""
    from .export import FORMATS, export_jsonl

    known = ("jsonl", *FORMATS)
    if format not in known:
        raise UserError(f"unknown export format {format!r}; known: {', '.join(known)}")
    if out is None and (format != "jsonl" or as_json):
        raise UserError(f"exporting {format} {'with --json ' if as_json else ''}needs --out")
    with _store(home) as (store, _):
        where = _filter(store, runs, status, emotion, valence, arousal, min_gain, prompt, since, limit)
        if out is None:
            export_jsonl(store, where, sys.stdout)
            return
        if format == "jsonl":
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", encoding="utf-8") as file:
                count = export_jsonl(store, where, file)
        else:
            count = FORMATS[format](store, where, out)
    if as_json:
        _print({"format": format, "out": str(out), "count": count})
    else:
        typer.echo(f"{count} {'events' if format == 'jsonl' else 'pairs'} in {out}", err=True)


@app.command()
def rm(
    runs: Annotated[list[str], typer.Argument(help='Run ids, their beginnings, or "last".')],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Delete runs: their events, and the images that no other run has."""
    with _store(home, write=True) as (store, _):
        where = _filter(store, runs)
        chosen = store.runs(where)
        if not yes:
            for row in chosen:
                going = " (not finished: something may still be writing it)" if row.finished is None else ""
                typer.echo(f"{row.run_id}  {row.images} images  {row.prompt[:60]}{going}", err=True)
            typer.confirm(f"Delete {len(chosen)} run{'s' * (len(chosen) != 1)}?", abort=True, err=True)
        events, files = store.remove(*(row.run_id for row in chosen))
    if as_json:
        _print({"removed": [row.run_id for row in chosen], "events": events, "files": files})
    else:
        typer.echo(
            f"deleted {len(chosen)} run{'s' * (len(chosen) != 1)}, {events} events, {files} files", err=True
        )


@app.command()
def replay(
    runs: Names = None,
    endpoint: Annotated[str | None, typer.Option(help="OTLP endpoint; default from the settings.")] = None,
    content: Annotated[bool, typer.Option(help="Put prompts and answers on the spans.")] = False,
    status: Status = None,
    emotion: Category = None,
    valence: Valence = None,
    arousal: Arousal = None,
    min_gain: MinGain = None,
    prompt: Prompt = None,
    since: Since = None,
    limit: Limit = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild OpenTelemetry spans from the log and send them, with their original times."""
    from .telemetry import open_exporter
    from .telemetry import replay as send

    with _store(home, traces={"otlp_endpoint": endpoint, "capture_content": content or None}) as (
        store,
        settings,
    ):
        where = _filter(store, runs, status, emotion, valence, arousal, min_gain, prompt, since, limit)
        exporter = open_exporter(settings.traces)
        spans, sent = 0, store.runs(where)
        try:
            for row in sent:
                spans += send(
                    store.events(row.run_id),
                    exporter,
                    store.blobs,
                    capture_content=settings.traces.capture_content,
                )
        finally:
            exporter.shutdown()
    if as_json:
        _print({"runs": [row.run_id for row in sent], "spans": spans})
    else:
        typer.echo(f"sent {spans} spans of {len(sent)} run{'s' * (len(sent) != 1)}", err=True)


@app.command()
def rebuild(home: Home = None) -> None:
    """Make the tables behind the lists again from the events; brings an older log up to date."""
    with _store(home, write=True) as (store, _):
        store.rebuild()
        typer.echo(f"rebuilt {len(store.runs())} runs from their events", err=True)


@contextmanager
def _store(
    home: Path | None, *, write: bool = False, traces: dict[str, Any] | None = None
) -> Iterator[tuple[TraceStore, Settings]]:
    from ..settings import load_settings
    from .store import StoreError, open_store

    settings = load_settings({"home": home, "traces": traces or {}})
    try:
        with open_store(settings, read_only=not write) as store:
            yield store, settings
    except BrokenPipeError:
        raise  # click knows what `… | head` means
    except (StoreError, OSError) as error:
        typer.echo(f"emoloop: {error}", err=True)
        raise typer.Exit(1) from error


def _filter(
    store: TraceStore,
    names: list[str] | None,
    status: RunStatus | None = None,
    emotion: Emotion | None = None,
    valence: Range | None = None,
    arousal: Range | None = None,
    min_gain: float | None = None,
    prompt: str | None = None,
    since: str | None = None,
    limit: int | None = None,
) -> RunFilter:
    from .rows import RunFilter

    return RunFilter(
        run_ids=tuple(store.resolve(name) for name in names) if names else None,
        status=status,
        category=emotion,
        valence=valence,
        arousal=arousal,
        min_gain=min_gain,
        prompt=prompt,
        since=None if since is None else _moment(since),
        limit=limit,
    )


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


def _print(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
