"""The command line: thin. Each verb parses its words, then calls the room that does the work.

Nothing heavy is imported at the top, so that `emoloop --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from .emotion import UserError
from .evals.bench.commands import bench
from .evals.commands import doctor, eval_
from .graph.commands import collect, run
from .rl.commands import distill
from .tools.commands import app as lvlm
from .traces.commands import app as traces

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


if __name__ == "__main__":
    main()
