"""A run and a list of runs for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..domain import Candidate, Critique, Draft, EmotionTarget, Missing, Proposal, Round, RunResult
from ..traces.rows import RunRow

#: Columns that are left out of a terminal with fewer signs in a line than this.
_DISPENSABLE, _WIDE = ("missing", "rounds", "started", "images"), 120


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
    for name in _DISPENSABLE if console.width < _WIDE else ():
        del columns[name]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        numeric = name in ("rounds", "images", "missing", "best", "gain")
        table.add_column(name, no_wrap=True, justify="right" if numeric else "left")
    # Alone among the columns it may be narrowed.
    table.add_column("prompt")
    for row, *cells in zip(rows, *columns.values(), strict=True):
        prompt = Text(" ".join(row.prompt.split()), no_wrap=True, overflow="ellipsis")
        table.add_row(*map(Text, cells), prompt)
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
    if (again := result.estimate) is not None:
        read = f"valence {again.valence:+.1f}, arousal {again.arousal:+.1f} where nothing was chosen"
        console.print(Text.assemble(("again   ", "dim"), read))
    for number, round_ in enumerate(result.rounds):
        console.print()
        console.print(_round(number, round_, result.best))
    for warning in result.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def show_drafts(console: Console, drafts: Sequence[Draft]) -> None:
    """Print what personas wrote."""
    for draft in drafts:
        console.print(_draft(draft), soft_wrap=True)


def target_text(target: EmotionTarget) -> str:
    """A target in a few letters: "V+2.0 A-1.0 awe"."""
    parts = [
        None if target.valence is None else f"V{target.valence:+.1f}",
        None if target.arousal is None else f"A{target.arousal:+.1f}",
        target.category,
    ]
    return " ".join(part for part in parts if part)


def _round(number: int, round_: Round, best: Candidate | None) -> RenderableType:
    parts: list[RenderableType] = []
    for place, one in enumerate(round_.proposals or [Proposal(prompt=round_.prompt)]):
        head = f"round {number}  " if place == 0 else " " * len(f"round {number}  ")
        shots = [str(it.index) for it in round_.candidates if it.prompt == one.prompt]
        told = f"  #{', '.join(shots)}" if len(round_.proposals) > 1 else ""
        parts.append(Text.assemble((head, "bold"), one.prompt, (told, "dim")))
        for name, words in (("changed", one.changes), ("because", one.why)):
            if words:
                parts.append(Text.assemble((f"  {name}  ", "dim"), words))
    parts += map(_draft, round_.drafts)
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


def _draft(draft: Draft) -> Text:
    """A persona's draft: its steps, what came of them, and what the director refused of it."""
    said = " → ".join(f"{step}: {words}" for step, words in draft.said.items())
    lines: list[Any] = [("  drafted  ", "dim"), (draft.persona, "bold"), f"  {said}"]
    told = (("→", draft.prompt), ("cannot be drawn:", ", ".join(draft.refused)), ("not used:", draft.reason))
    for what, words in told:
        lines += [f"\n           {what} {words}"] if words else []
    return Text.assemble(*lines)


def _reading(critique: Critique | Missing | None) -> tuple[str, ...]:
    if not isinstance(critique, Critique):
        return ("–",) * 4
    numbers = f"{critique.valence:+.1f}", f"{critique.arousal:+.1f}"
    return *numbers, critique.category or "–", f"{critique.alignment:.1f}"


def _words(critique: Critique | Missing | None) -> Text:
    if critique is None:
        return Text("not yet", style="dim")
    if isinstance(critique, Missing):
        return Text(f"missing: {critique.reason}", style="yellow")
    return Text(" → ".join(filter(None, (critique.analysis, critique.suggestion))))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _time(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M")
