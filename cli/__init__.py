"""The command line: thin. Each verb parses its words, then calls the room that does the work.

Nothing heavy is imported at the top, so that `emoloop --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ..domain import Failure, UserError
from .bank import app as bank
from .bench import bench
from .collect import collect
from .distill import distill
from .evals import doctor, eval_
from .lvlm import app as lvlm
from .make import make
from .rewrite import rewrite
from .run import resume, run
from .serve import serve
from .traces import app as traces
from .train import app as train
from .worker import job, queue, worker

app = typer.Typer(
    name="emoloop",
    help="Pictures that make people feel what they were meant to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run)
app.command()(resume)
app.command()(rewrite)
app.command()(make)
app.command()(collect)
app.command()(worker)
app.command()(queue)
app.command(hidden=True)(job)
app.command()(distill)
app.command(context_settings={"ignore_unknown_options": True})(bench)  # --tune and the like are benches' own
app.add_typer(train, name="train")
app.add_typer(bank, name="bank")
app.command()(serve)
app.add_typer(lvlm, name="lvlm")
app.add_typer(traces, name="traces")
app.command("eval")(eval_)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"emoloop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pictures that make people feel what they were meant to."""


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2, what could not be done in one line and 1."""
    if sys.stdin is None:
        # A scheduler may have closed it; the libraries below expect one.
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal of another encoding shows a code where it has no sign; that is no reason to stop.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        print(f"emoloop: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (Failure, OSError) as error:
        if os.environ.get("EMOLOOP_DEBUG"):
            raise
        print(f"emoloop: {error}", file=sys.stderr)
        raise SystemExit(1) from None
