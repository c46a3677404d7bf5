"""The command line: thin. Each verb parses its words, then calls the room that does the work.

Nothing heavy is imported at the top, so that `emoloop --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from ..domain import UserError
from .bench import bench
from .distill import distill
from .evals import doctor, eval_
from .lvlm import app as lvlm
from .run import collect, run
from .traces import app as traces

app = typer.Typer(
    name="emoloop",
    help="Pictures that make people feel what they were meant to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run)
app.command()(collect)
app.command()(distill)
app.command()(bench)
app.add_typer(lvlm, name="lvlm")
app.add_typer(traces, name="traces")
app.command("eval")(eval_)
app.command()(doctor)


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"emoloop: {error}", file=sys.stderr)
        raise SystemExit(2) from None
