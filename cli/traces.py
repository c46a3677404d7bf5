"""`emoloop traces …`: thin verbs over the store. Only typer loads before a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import UserError, read_target
from ..traces.document import result_json
from . import options as opt

if TYPE_CHECKING:
    from ..settings import Settings
    from ..traces.store import TraceStore

app = typer.Typer(help="The log: list, show, export, bundle, remove, replay, rebuild.", no_args_is_help=True)

#: Lines of `list` unless `--where limit=` says otherwise.
_LINES = 50

File = Annotated[Path | None, typer.Option("--out", help="File or folder; jsonl goes to stdout without it.")]
Run = Annotated[str, typer.Argument(help='Run id, its beginning, or "last".')]
Runs = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help='Ids, their beginnings, or "last".')
]


@app.command("list", cls=opt.Filtered)
def list_(where: opt.Where = None, home: opt.Home = None, as_json: opt.AsJson = False) -> None:
    """List runs, newest first."""
    with _store(home) as store:
        wanted = opt.read_where(where, default_limit=_LINES)
        rows = store.runs(opt.chosen(store, None, wanted))
        if as_json:
            opt.print_json({"home": str(store.home), "runs": [row.model_dump(mode="json") for row in rows]})
            return
    from rich.console import Console

    from .traces_view import show_runs

    show_runs(Console(), rows)
    if len(rows) == wanted.limit:
        _say(f"The newest {wanted.limit}; --limit shows more.")


@app.command()
def show(run: Run, home: opt.Home = None, as_json: opt.AsJson = False) -> None:
    """Show a run: its rounds, prompts, critiques and rewards."""
    from rich.console import Console

    from .traces_view import show_run

    with _store(home) as store:
        result = store.run(store.resolve(run))
    opt.tell(result_json(result), as_json, lambda: show_run(Console(), result))


@app.command(cls=opt.Filtered)
def export(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="jsonl (events); pickapic, pickapic-all (preference pairs: one of a run, or all); reflection "
            "(verl-omni's trajectories); critic- or rewriter- with messages, completion or preference (chats for "
            "TRL); or a dotted path.",
        ),
    ],
    runs: Runs = None,
    where: opt.Where = None,
    out: File = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Export runs for other tools."""
    from ..traces.exchange.export import export_jsonl, load_format

    write, noun = load_format(format)
    if out is None and (format != "jsonl" or as_json):
        raise UserError(f"exporting {format} {'with --json ' if as_json else ''}needs --out")
    with _store(home) as store:
        wanted = opt.chosen(store, runs, opt.read_where(where))
        if out is None:
            export_jsonl(store, wanted, sys.stdout)
            return
        count = write(store, wanted, out)
    told = {"format": format, "out": str(out), "count": count}
    opt.tell(told, as_json, lambda: _say(f"{opt.many(count, noun)} in {out}"))


@app.command(cls=opt.Filtered)
def bundle(
    out: Annotated[Path, typer.Option(help="The folder; new, or empty.")],
    runs: Runs = None,
    where: opt.Where = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write runs as a folder of pages that opens from disk, with all pictures inside."""
    from ..service.bundle import write_bundle

    if not runs and not where:
        raise UserError("say which runs: their ids, or --where KEY=VALUE")
    settings = _settings(home)
    with _open(settings) as store:
        rows = store.runs(opt.chosen(store, runs, opt.read_where(where)))
        count = write_bundle(store, [row.run_id for row in rows], out, settings.traces.metadata)
    told = {"runs": [row.run_id for row in rows], "index": str(out / "index.html")}
    opt.tell(told, as_json, lambda: _say(f"{opt.many(count, 'run')} in {out / 'index.html'}"))


@app.command(cls=opt.Filtered)
def rm(
    runs: Runs = None,
    where: opt.Where = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Delete runs: their events, and the images that no other run has."""
    if not runs and not where:
        raise UserError("say which runs go: their ids, or --where KEY=VALUE")
    with _store(home, write=True) as store:
        rows = store.runs(opt.chosen(store, runs, opt.read_where(where)))
        if not yes:
            for row in rows:
                going = " (not finished: something may still be writing it)" if row.finished is None else ""
                _say(f"{row.run_id}  {row.images} images  {row.prompt[:60]}{going}")
            typer.confirm(f"Delete {opt.many(len(rows), 'run')}?", abort=True, err=True)
        events, files = store.remove(*(row.run_id for row in rows))
    told = {"removed": [row.run_id for row in rows], "events": events, "files": files}
    gone = f"{opt.many(len(rows), 'run')}, {opt.many(events, 'event')}, {opt.many(files, 'file')}"
    opt.tell(told, as_json, lambda: _say(f"deleted {gone}"))


@app.command(cls=opt.Filtered)
def replay(
    runs: Runs = None,
    where: opt.Where = None,
    endpoint: Annotated[str | None, typer.Option(help="OTLP endpoint; default from the settings.")] = None,
    content: Annotated[bool, typer.Option(help="Put prompts and answers on the spans.")] = False,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
) -> None:
    """Rebuild OpenTelemetry spans from the log and send them, with their original times."""
    from ..traces import spans as telemetry

    settings = _settings(home, {"otlp_endpoint": endpoint, "capture_content": content or None})
    with _open(settings) as store:
        spans, rows = 0, store.runs(opt.chosen(store, runs, opt.read_where(where)))
        exporter = telemetry.open_exporter(settings.traces)
        try:
            for row in rows:
                events = store.events(row.run_id)
                spans += telemetry.replay(
                    events,
                    exporter,
                    store.blobs,
                    capture_content=settings.traces.capture_content,
                    picture_bytes=settings.traces.picture_bytes,
                )
        finally:
            exporter.shutdown()
    told = {"runs": [row.run_id for row in rows], "spans": spans}
    opt.tell(told, as_json, lambda: _say(f"sent {opt.many(spans, 'span')} of {opt.many(len(rows), 'run')}"))


@app.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(
            help="Preferences: parquet in the pick-a-pic schema, the folder of an export, or HPD's JSON. "
            "People's ratings: CSV with sha256, valence, arousal, rating."
        ),
    ],
    valence: Annotated[float | None, typer.Option(help="Wanted valence of rows that name no target.")] = None,
    arousal: Annotated[float | None, typer.Option(help="Wanted arousal of rows that name no target.")] = None,
    emotion: Annotated[str | None, typer.Option(help="Wanted category of such rows.")] = None,
    model: Annotated[str | None, typer.Option(help="What made the images: the model to train.")] = None,
    scale: Annotated[
        str, typer.Option(metavar="LOW..HIGH", help="Scale of valence and arousal in ratings.")
    ] = "-3..3",
    home: opt.Home = None,
) -> None:
    """Add preferences from elsewhere, or people's ratings of logged pictures, to the log."""
    from ..traces.exchange.intake import import_file
    from ..traces.store import open_store

    given = {"valence": valence, "arousal": arousal, "category": emotion}
    target = read_target(given) if any(value is not None for value in given.values()) else None
    try:
        low, high = map(float, scale.split(".."))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise UserError(f"--scale {scale}: want LOW..HIGH, such as 1..9")
    with open_store(_settings(home)) as store:
        _say(f"took {opt.many(*import_file(store, path, target=target, model=model, scale=(low, high)))}")


@app.command()
def rebuild(home: opt.Home = None) -> None:
    """Make the tables behind the lists again from the events; brings an older log up to date."""
    with _store(home, write=True) as store:
        store.rebuild()
        _say(f"rebuilt {opt.many(len(store.runs()), 'run')} from their events")


def _settings(home: Path | None, traces: dict[str, Any] | None = None) -> Settings:
    from ..settings import load_settings, pruned

    return load_settings(pruned({"home": home, "traces": traces or {}}))


def _store(home: Path | None, *, write: bool = False) -> TraceStore:
    return _open(_settings(home), write=write)


def _open(settings: Settings, *, write: bool = False) -> TraceStore:
    """The log of these settings, which must be there: no verb here but `import` begins one."""
    from ..traces.database import log_exists
    from ..traces.store import open_store

    if not log_exists(settings):
        raise UserError(f"no traces in {settings.home}: choose another home, or make a run first")
    return open_store(settings, read_only=not write)


def _say(text: str) -> None:
    typer.echo(text, err=True)
