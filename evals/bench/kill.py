"""Kills runs at random moments and resumes them: is anything lost, doubled, or decided differently?

Each trial starts `emoloop run` in a process of its own, kills it with SIGKILL, reads what the log had
acknowledged, resumes (sometimes killing that one too), and compares with a run that was left in peace.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...domain import RunResult, RunStatus
from ...events import Event
from ...settings import Settings
from ...traces.store import open_store

#: Given a home and whether to resume, the command line of one process.
Command = Callable[[Path, bool], Sequence[str]]

#: Seconds after which a process counts as hung.
_HUNG = 1800.0


def main(
    kills: int = 20,
    rounds: int = 3,
    images: int = 4,
    seed: int = 0,
    prompt: str = "a dog by the sea",
    valence: float = 2.0,
    arousal: float = -1.0,
    model: str = "",
    lvlm: str = "",
) -> dict[str, Any]:
    """Crash safety: kill -9 at random moments, then resume.

    Args:
        kills: Trials.
        rounds: Most rounds of the run.
        images: Pictures in a round.
        seed: Of the run, and of the moments.
        prompt: What the run is asked for.
        valence: Wanted.
        arousal: Wanted.
        model: Generator, if not the settings'.
        lvlm: LVLM, if not the settings'.
    """

    def command(home: Path, resume: bool) -> list[str]:
        asked = [prompt, f"--valence={valence}", f"--arousal={arousal}", f"--seed={seed}"]
        asked += [f"--rounds={rounds}", f"--images={images}"]
        words = ["--resume", "last"] if resume else asked
        models = [f"--model={model}"] if model else []
        models += [f"--lvlm={lvlm}"] if lvlm else []
        outputs = [f"--home={home}", f"--out={home / 'out'}"]
        return [
            sys.executable,
            "-m",
            f"{(__package__ or '').partition('.')[0]}.cli",
            "run",
            *words,
            *models,
            *outputs,
        ]

    figures = study(command, kills, seed)
    return {
        "figures": figures,
        "settings": {"kills": kills, "rounds": rounds, "images": images, "seed": seed},
    }


def study(command: Command, kills: int, seed: int) -> dict[str, float]:
    """Run the trials.

    Args:
        command: Makes the command lines; the process says "run" on stderr when its run is in the log.
        kills: Trials.
        seed: Of the moments.

    Returns:
        Sums over the trials: `killed` (processes that died under way), `lost` (acknowledged events that are
        gone or changed), `doubled` (events with a key that another has), `different` (trials whose pick, prompts
        or rewards are not those of the undisturbed run), `unfinished`, and `events` that were compared.
    """
    moments = random.Random(seed)
    figures: dict[str, float] = dict.fromkeys(
        ("kills", "killed", "lost", "doubled", "different", "unfinished", "events"), 0.0
    )
    with tempfile.TemporaryDirectory(prefix="emoloop-kill-") as folder:
        calm = Path(folder, "calm")
        span = _run(command(calm, False), None)
        [expected], _ = _read(calm)
        for trial in range(kills):
            home = Path(folder, f"trial-{trial}")
            acknowledged: list[Event] = []
            resume = False
            for _ in range(2):
                died = _run(command(home, resume), moments.uniform(0, span)) < 0
                figures["killed"] += died
                _, acknowledged = _read(home)
                resume = bool(acknowledged)
                if not died:
                    break
            _run(command(home, resume), None)
            [result], events = _read(home)
            kept = {event.seq: event for event in events}
            figures["kills"] += 1
            figures["events"] += len(acknowledged)
            figures["lost"] += sum(kept.get(event.seq) != event for event in acknowledged)
            figures["doubled"] += len(events) - len({event.key for event in events})
            figures["unfinished"] += result.status is not RunStatus.COMPLETED
            figures["different"] += _essence(result) != _essence(expected)
            print(f"kill {trial + 1}/{kills}: {len(acknowledged)} events acknowledged", file=sys.stderr)
    return figures


def _run(command: Sequence[str], kill_after: float | None) -> float:
    """Run a process to its end, or kill it some seconds after its run began.

    Returns:
        Seconds from the beginning of the run to the end; -1 for a process that was killed.
    """
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("run "):
                break
        began = time.monotonic()
        try:
            _, rest = process.communicate(timeout=_HUNG if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kill_after is None:
                raise
            return -1.0
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)}{rest}")
        return time.monotonic() - began


def _read(home: Path) -> tuple[list[RunResult], list[Event]]:
    with open_store(Settings(home=home), read_only=True) as store:
        rows = store.runs()
        assert len(rows) <= 1, "a resumed run must not begin another"
        return [store.run(row.run_id) for row in rows], [e for row in rows for e in store.events(row.run_id)]


def _essence(result: RunResult) -> Any:
    """What two runs of one request have in common; paths and names are their own."""
    rounds = [
        (round.prompt, [(it.index, it.seed, it.sha256, it.reward) for it in round.candidates])
        for round in result.rounds
    ]
    best = (result.best.round, result.best.index, result.best.sha256) if result.best else None
    return rounds, best, result.stop_reason, result.gain, result.best_gain
