"""A run as a person at a terminal sees it: a bar with the time left, and a few lines for each round."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..agents.schemas import target_text
from ..domain import Candidate, Critique, RunResult, RunStatus
from ..graph import progress as said


class RunView:
    """Prints the progress messages of one run; use as a context manager and call with each message.

    Args:
        console: Where to; the bar is left out where that is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, state="")
        self._began = self._round_began = time.monotonic()
        self._images = 0
        self._round = 0
        self._made: set[int] = set()
        self._judged: dict[int, said.Judged] = {}

    def __enter__(self) -> RunView:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, message: said.Progress) -> None:
        """Show one message."""
        match message:
            case said.RunBegan():
                self._images = message.images
                # A picture takes longer than a critique; the remaining time follows the speed of late.
                self._bar.update(self._task, total=message.rounds * message.images * 2)
                self._line(
                    f"[bold]{escape(message.prompt)}[/]  →  {target_text(message.target)}",
                    f"[dim]run {message.run_id} · seed {message.seed} · up to {message.rounds} rounds of "
                    f"{message.images} images[/]",
                )
            case said.RoundBegan():
                self._round, self._made, self._judged = message.round, set(), {}
                self._round_began = time.monotonic()
                self._line("", f"[bold]round {message.round}[/]  {escape(message.prompt)}")
                if message.changes:
                    self._line(f"  [dim]changed: {escape(message.changes)}[/]")
            case said.ImageMade():
                self._made.add(message.index)
            case said.Judged():
                self._judged[message.index] = message
            case said.RoundEnded():
                self._line(f"  {self._summary(message)}")
            case said.Warned():
                self._line(f"  [yellow]warning: {escape(message.message)}[/]")
        done = self._images * 2 * self._round + len(self._made) + len(self._judged)
        self._bar.update(
            self._task,
            completed=done,
            description=f"round {self._round}",
            state=f"images {len(self._made)}/{self._images} · read {len(self._judged)}/{self._images}",
        )

    def _summary(self, ended: said.RoundEnded) -> str:
        seconds = f"[dim]{time.monotonic() - self._round_began:.0f} s[/]"
        read = f"{ended.judged} of {ended.images} read"
        if ended.mean_reward is None or ended.best_reward is None:
            return f"[red]{read}[/] · {seconds}"
        rewarded = [one for one in self._judged.values() if one.reward is not None]
        top = max(rewarded, key=lambda one: one.reward or 0.0)
        estimate = _estimate(top.critique) if isinstance(top.critique, Critique) else ""
        star = " [green]★[/]" if ended.best_reward == ended.best else ""
        mean = f"mean {ended.mean_reward:+.2f}"
        return f"best {ended.best_reward:+.2f} ({estimate}){star} · {mean} · {read} · {seconds}"

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
    rounds = len(result.rounds)
    line(f"[{colour}]{reason}[/] after {rounds} round{'s' if rounds != 1 else ''}, {seconds:.0f} s")
    if result.best is not None:
        line(f"best   {_best(result.best)}")
    if result.gain is not None and result.best_gain is not None:
        line(f"gain   {result.gain:+.2f} in the round's mean, {result.best_gain:+.2f} from best to best")
    for name, path in files.items():
        line(f"{name:<6} {escape(path)}")


def _best(best: Candidate) -> str:
    estimate = f", {_estimate(best.critique)}" if isinstance(best.critique, Critique) else ""
    reward = f"reward {best.reward:+.2f}" if best.reward is not None else "no reward"
    return f"round {best.round}, candidate {best.index}: {reward}{estimate}, seed {best.seed}"


def _estimate(critique: Critique) -> str:
    category = f" {critique.category.value}" if critique.category else ""
    return f"V {critique.valence:+.1f} A {critique.arousal:+.1f}{category}, shows {critique.alignment:.1f}"
