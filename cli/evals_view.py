"""What the terminal says: the same figures as the report, in as few lines as will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evals.wording import METRICS, interval, number, shown

#: Columns of the terminal's table; the report has all.
_SHOWN = (
    "error",
    "error_reduction",
    "amortisation",
    "subject_accuracy",
    "content_kept",
    "estimate_bias",
    "images",
    "lvlm_calls",
)


def show(document: dict[str, Any], folder: Path) -> None:
    """The figures of one evaluation."""
    console = Console()
    table = Table(
        title=escape(
            f"{document['suite']} v{document['suite_version']}, judged by {document['judge']['name']}"
        )
    )
    table.add_column("arm")
    metrics = [key for key in _SHOWN if any(key in arm["metrics"] for arm in document["arms"].values())]
    for key in metrics:
        table.add_column(METRICS[key].label, justify="right")
    table.add_column("n", justify="right")
    for name, arm in document["arms"].items():
        cells = (shown(arm["metrics"].get(key), METRICS[key].digits, "\n") for key in metrics)
        table.add_row(escape(name), *cells, str(arm["delivered"]))
    console.print(table)
    if document["reward_judge"]:
        console.print(
            f"[bold red]The judge also gave the reward ({escape(document['reward_judge'])}): no evidence.[/]"
        )
    if document["verdict"]:
        console.print(document["verdict"], markup=False)
    for flag in document["flags"]:
        console.print(f"[bold red]{escape(flag['sentence'])}[/]")
    for name, arm in document["arms"].items():
        for reason, count in arm["failures"].items():
            failed = f"{name}: {count} of {arm['requests']} requests failed: {reason}"
            console.print(failed, style="yellow", markup=False)
    console.print(f"{document['images_made']} images made now. Report: {escape(str(folder / 'report.html'))}")


def show_comparison(document: dict[str, Any]) -> None:
    """Two reports side by side."""
    console = Console()
    for warning in document["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")
    table = Table(title=escape(f"{document['a']} → {document['b']}"))
    for column in ("arm", "metric", "A", "B", "B − A (95 %)", "p", "n"):
        table.add_column(column, justify="left" if column in ("arm", "metric") else "right")
    for row in document["changes"]:
        digits = METRICS[row["metric"]].digits
        p = "–" if row["p"] is None else f"{row['p']:.3f}"
        change = f"{number(row['value'], digits, sign=True)} ({interval(row, digits, sign=True)})"
        sides = (number(row["a"], digits), number(row["b"], digits))
        table.add_row(escape(row["arm"]), METRICS[row["metric"]].label, *sides, change, p, str(row["n"]))
    console.print(table)


def show_doctor(document: dict[str, Any]) -> None:
    """What the doctor found."""
    console = Console()
    marks = {"ok": "[green]ok[/]", "missing": "[bold red]missing[/]", "optional": "[yellow]optional[/]"}
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in document["checks"]:
        text = check["found"] if not check["remedy"] else f"{check['found']}\n→ {check['remedy']}"
        table.add_row(marks[check["state"]], escape(check["name"]), escape(text))
    console.print(table)
    console.print("\nSettings in force (defaults in grey):")
    settings = Table(show_header=False, box=None, pad_edge=False)
    for row in document["settings"]:
        style = "" if row["set"] else "dim"
        settings.add_row(row["name"], escape(str(row["value"])), style=style)
    console.print(settings)
    console.print(
        "[green]All that is needed is here.[/]"
        if document["ok"]
        else "[bold red]See what is missing above.[/]"
    )
