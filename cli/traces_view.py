"""A run and a list of runs for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..domain import Candidate, Critique, EmotionTarget, Missing, Round, RunResult
from ..traces.rows import RunRow

#: Columns that go first where the terminal is too narrow for the prompt, and the least room it gets.
_DISPENSABLE = ("missing", "rounds", "started", "images")
_PROMPT_ROOM = 24


def show_runs(console: Console, rows: Sequence[RunRow]) -> None:
    """Print one line for each run, with as much of the prompt as there is room for."""
    columns = {
        "run": [row.run_id for row in rows],
        "started": [_time(row.started) for row in rows],
        "status": [row.stop_reason or row.status for row in rows],
        "target": [target_text(row.target) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        "images": [str(row.images) for row in rows],
        "missing": [str(row.missing or "") for row in rows],
        "best": [_number(row.best_reward) for row in rows],
        "gain": [_number(row.gain) for row in rows],
    }
    if any(row.adapter for row in rows):
        # As `--where adapter=` and `distill --from adapter=` take it.
        columns["adapter"] = [(row.adapter or "none")[:12] for row in rows]
    widths = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    for name in _DISPENSABLE:
        if console.width - sum(widths.values()) - 2 * len(widths) < _PROMPT_ROOM:
            del columns[name], widths[name]
    room = max(console.width - sum(widths.values()) - 2 * len(widths), _PROMPT_ROOM // 2)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        numeric = name in ("rounds", "images", "missing", "best", "gain")
        justify = "right" if numeric else "left"
        table.add_column(name, no_wrap=True, justify=justify, min_width=widths[name])
    table.add_column("prompt", no_wrap=True)
    for row, *cells in zip(rows, *columns.values(), strict=True):
        prompt = Text(" ".join(row.prompt.split()))
        prompt.truncate(room, overflow="ellipsis")
        table.add_row(*(Text(cell) for cell in cells), prompt)
    console.print(table)


def show_run(console: Console, result: RunResult) -> None:
    """Print a run: what was wanted, then each round's prompt, candidates and critiques."""
    state = result.status if result.stop_reason is None else f"{result.status}, {result.stop_reason}"
    console.print(Text.assemble(("run ", "dim"), (result.run_id, "bold"), ("  " + state, "dim")))
    console.print(Text.assemble(("prompt  ", "dim"), result.prompt))
    console.print(Text.assemble(("target  ", "dim"), target_text(result.target)))
    if result.best is not None:
        won = f"{_number(result.best.reward)} in round {result.best.round}, candidate {result.best.index}"
        console.print(Text.assemble(("best    ", "dim"), won))
        if result.best.path is not None:
            console.print(Text(f"        {result.best.path}"), soft_wrap=True)
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
    for name in ("", "#", "reward", "valence", "arousal", "category", "shows", "seed", "image"):
        table.add_column(name, justify="left" if name in ("category", "image") else "right", no_wrap=True)
    words = Table.grid(padding=(0, 2, 0, 0))
    for candidate in round_.candidates:
        table.add_row(
            "★" if candidate is best else "",
            str(candidate.index),
            _number(candidate.reward),
            *_reading(candidate.critique),
            str(candidate.seed),
            candidate.sha256[:8],
        )
        words.add_row(Text(str(candidate.index), style="dim"), _words(candidate.critique))
    indent = (0, 0, 0, 2)
    return Group(*parts, Padding(table, indent), Padding(words, indent))


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
