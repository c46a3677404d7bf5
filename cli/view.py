"""A run as a person at a terminal sees it: a bar with the time left, and a few lines for each round."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from ..agents.schemas import target_text
from ..domain import Candidate, Critique, RunResult, RunStatus
from ..events import Event, Rewarded, Rewritten, RunStarted
from ..traces.fold import Fold
from .options import bars, many


class RunView:
    """Prints the events of one run; use as a context manager and call with each event.

    Args:
        console: Where to; the bar is left out where that is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = bars(console, "{task.fields[state]}", transient=True)
        self._task = self._bar.add_task("", total=None, state="")
        self._round_began = time.monotonic()
        self._fold = Fold("")
        self._warned: set[str] = set()

    def __enter__(self) -> RunView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No bar within the block."""
        self._bar.stop()
        yield
        self._bar.start()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._fold.apply(event)
        match event:
            case RunStarted():
                # A picture takes longer than a critique; the remaining time follows the speed of late.
                self._bar.update(self._task, total=self._of("rounds") * self._of("images") * 2)
                self._line(
                    f"[bold]{escape(event.prompt)}[/]  →  {target_text(event.target)}",
                    f"[dim]run {event.run_id} · seed {event.seed} · up to "
                    f"{many(self._of('rounds'), 'round')} of {many(self._of('images'), 'image')}[/]",
                )
                if not event.settings.get("loop", {}).get("rewrite_first"):
                    self._begin(0, event.prompt)
            case Rewritten() if len(self._fold.proposals(event.round)) > 1:
                self._line(f"         {escape(event.prompt)}")
            case Rewritten():
                self._begin(event.round, event.prompt, event.changes if self._of("proposals") < 2 else "")
            case Rewarded() if self._is_read(event.round):
                self._line(*(f"  {line}" for line in self._summary(event.round)))
        self._warn()
        row = self._fold.round(event.round).values()
        made, read = sum(it.made is not None for it in row), sum(it.rewarded is not None for it in row)
        images = self._of("images")
        self._bar.update(
            self._task,
            completed=images * 2 * event.round + made + read,
            description=f"round {event.round}",
            state=f"images {made}/{images} · read {read}/{images}",
        )

    def _of(self, option: str) -> int:
        started = self._fold.started
        return int(started.settings.get("loop", {}).get(option, 0)) if started else 0

    def _begin(self, number: int, prompt: str, changes: str = "") -> None:
        self._round_began = time.monotonic()
        self._line("", f"[bold]round {number}[/]  {escape(prompt)}")
        if changes:
            self._line(f"  [dim]changed: {escape(changes)}[/]")

    def _is_read(self, number: int) -> bool:
        row = self._fold.round(number).values()
        return len(row) >= self._of("images") and all(it.rewarded or not it.made for it in row)

    def _warn(self) -> None:
        # What a round lacks may still be mended until it is read.
        for warning in self._fold.warnings():
            number = re.match(r"round (\d+): ", warning)
            if warning not in self._warned and (number is None or self._is_read(int(number[1]))):
                self._warned.add(warning)
                self._line(f"  [yellow]warning: {escape(warning)}[/]")

    def _summary(self, number: int) -> list[str]:
        seconds = f"[dim]{time.monotonic() - self._round_began:.0f} s[/]"
        row = self._fold.round(number)
        rewards = {index: it.reward for index, it in row.items() if it.reward is not None}
        read = f"{len(rewards)} of {sum(it.made is not None for it in row.values())} read"
        if not rewards:
            return [f"[red]{read}[/] · {seconds}"]
        top = max(rewards, key=lambda index: rewards[index])
        critique = row[top].critique
        estimate = _estimate(critique) if isinstance(critique, Critique) else ""
        star = " [green]★[/]" if self._fold.best and self._fold.best[0] == number else ""
        mean = f"mean {self._fold.mean_reward(number):+.2f}"
        made = row[top].made
        several = len(self._fold.proposals(number)) > 1
        return [
            f"best {rewards[top]:+.2f} ({estimate}){star} · {mean} · {read} · {seconds}",
            *([f"     {escape(made.prompt)}"] if made and several else []),
        ]

    def _line(self, *lines: str) -> None:
        for line in lines:
            self._bar.console.print(line, highlight=False, soft_wrap=not self.console.is_terminal)


def show_result(console: Console, result: RunResult, files: dict[str, str], seconds: float) -> None:
    """Print how a run ended and what it left."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line("")
    reason = result.stop_reason.value.replace("_", " ") if result.stop_reason else result.status.value
    colour = "green" if result.status is RunStatus.COMPLETED else "red"
    line(f"[{colour}]{reason}[/] after {many(len(result.rounds), 'round')}, {seconds:.0f} s")
    if result.best is not None:
        line(f"best   {_best(result.best)}")
    if result.estimate is not None:
        line(f"again  {_estimate(result.estimate)}, from a picture of its prompt that chose nothing")
    if result.gain is not None and result.best_gain is not None:
        line(f"gain   {result.gain:+.2f} in the prompt's mean, {result.best_gain:+.2f} from best to best")
    for name, path in files.items():
        line(f"{name:<6} {escape(path)}")


def _best(best: Candidate) -> str:
    estimate = f", {_estimate(best.critique)}" if isinstance(best.critique, Critique) else ""
    reward = f"reward {best.reward:+.2f}" if best.reward is not None else "no reward"
    return f"round {best.round}, candidate {best.index}: {reward}{estimate}, seed {best.seed}"


def _estimate(critique: Critique) -> str:
    category = f" {critique.category.value}" if critique.category else ""
    return f"V {critique.valence:+.1f} A {critique.arousal:+.1f}{category}, shows {critique.alignment:.1f}"
