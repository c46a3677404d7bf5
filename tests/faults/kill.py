"""Kills runs at random moments and resumes them: is anything lost, doubled, or decided differently?

Each trial starts `emoloop run` in a process of its own, kills it with SIGKILL, reads what the log had
acknowledged, resumes (sometimes killing that one too), and compares with an undisturbed run.

    python tests/faults/kill.py [KILLS]       # with the embedded models, 20 kills by default

"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emoloop.domain import RunResult, RunStatus
from emoloop.events import Event
from emoloop.settings import Settings
from emoloop.traces.store import open_store

#: Given a home and whether to resume, the command line of one process.
Command = Callable[[Path, bool], Sequence[str]]

#: Seconds after which a process counts as hung.
_HUNG = 1800.0


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


def _emoloop(home: Path, resume: bool) -> list[str]:
    """`emoloop run` or its resumption."""
    target = ["--valence=2", "--arousal=-1", "--seed=0", "--rounds=3", "--images=4"]
    words = ["--resume", "last"] if resume else ["a dog by the sea", *target]
    return [sys.executable, "-m", "emoloop", "run", *words, f"--home={home}", f"--out={home / 'out'}"]


if __name__ == "__main__":
    print(json.dumps(study(_emoloop, int((sys.argv[1:] or ["20"])[0]), seed=0)))
