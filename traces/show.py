"""A run and a list of runs for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..emotion import Candidate, Critique, EmotionTarget, Missing, Round, RunResult
from .rows import RunRow


def show_runs(console: Console, rows: Iterable[RunRow]) -> None:
    """Print one line for each run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("started", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("rounds", "images", "missing", "best", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.run_id,
            _time(row.started),
            row.stop_reason or row.status,
            target_text(row.target),
            Text(row.prompt),
            str(row.rounds),
            str(row.images),
            str(row.missing or ""),
            _number(row.best_reward),
            _number(row.gain),
        )
    console.print(table)


def show_run(console: Console, result: RunResult) -> None:
    """Print a run: what was wanted, then each round's prompt, candidates and critiques."""
    state = result.status if result.stop_reason is None else f"{result.status}, {result.stop_reason}"
    console.print(Text.assemble(("run ", "dim"), (result.run_id, "bold"), ("  " + state, "dim")))
    console.print(Text.assemble(("prompt  ", "dim"), result.prompt))
    console.print(Text.assemble(("target  ", "dim"), target_text(result.target)))
    if result.best is not None:
        won = f"{_number(result.best.reward)} in round {result.best.round}, candidate {result.best.index}"
        console.print(Text.assemble(("best    ", "dim"), won, "  ", str(result.best.path or "")))
        gains = f"{_number(result.gain)} mean, {_number(result.best_gain)} best"
        console.print(Text.assemble(("gain    ", "dim"), gains))
    for number, round_ in enumerate(result.rounds):
        console.print()
        console.print(_round(number, round_, result.best))
    for warning in result.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def target_text(target: EmotionTarget) -> str:
    """A target in a few letters: "V+2.0 A-1.0 awe"."""
    parts = [
        None if target.valence is None else f"V{target.valence:+.1f}",
        None if target.arousal is None else f"A{target.arousal:+.1f}",
        target.category,
    ]
    return " ".join(part for part in parts if part)


def _round(number: int, round_: Round, best: Candidate | None) -> RenderableType:
    parts: list[RenderableType] = [Text.assemble((f"round {number}  ", "bold"), round_.prompt)]
    for name, words in (("changed", round_.changes), ("because", round_.why)):
        if words:
            parts.append(Text.assemble((f"  {name}  ", "dim"), words))
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "#", "reward", "valence", "arousal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("category", no_wrap=True)
    table.add_column("shows", justify="right", no_wrap=True)
    table.add_column("seed", justify="right", no_wrap=True)
    table.add_column("image", no_wrap=True)
    table.add_column("critique", ratio=1)
    for candidate in round_.candidates:
        table.add_row(
            "★" if candidate is best else "",
            str(candidate.index),
            _number(candidate.reward),
            *_reading(candidate.critique),
            str(candidate.seed),
            candidate.sha256[:12],
            _words(candidate.critique),
        )
    return Group(*parts, Padding(table, (0, 0, 0, 2)))


def _reading(critique: Critique | Missing | None) -> tuple[str, str, str, str]:
    if not isinstance(critique, Critique):
        return "–", "–", "–", "–"
    valence, arousal = f"{critique.valence:+.1f}", f"{critique.arousal:+.1f}"
    return valence, arousal, critique.category or "–", f"{critique.alignment:.1f}"


def _words(critique: Critique | Missing | None) -> Text:
    match critique:
        case Critique():
            return Text(
                f"{critique.analysis} → {critique.suggestion}" if critique.suggestion else critique.analysis
            )
        case Missing():
            return Text(f"missing: {critique.reason}", style="yellow")
        case None:
            return Text("not yet", style="dim")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _time(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")
