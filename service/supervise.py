"""The supervisor of one job: a small process that holds its lease while its command runs, and says how it ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..tools.children import GuardedProcess
from ..traces.queue import owner_name
from ..traces.store import TraceStore
from .jobs import KINDS, JobRequest

#: Seconds between two renewals of a job's lease, and that it lasts.
_RENEW, _LEASE = 2.0, 30.0

#: Seconds that a cancelled job has to save what it has.
_GRACE = 60.0


def emoloop(words: Sequence[str]) -> list[str]:
    """A command of this program."""
    return [sys.executable, "-m", "emoloop", *words]


def supervise(
    store: TraceStore, job_id: str, command: Callable[[Sequence[str]], Sequence[str]] = emoloop
) -> bool:
    """Take a job, run its command to the end, and write how it ended.

    The command ends with this process, however that ends. It writes to this process's output, which is the job's log.

    Args:
        store: The log.
        job_id: The job.
        command: Makes the command line of the job's words.

    Returns:
        Whether the job was there to be taken.
    """
    owner = owner_name()
    taken = next(
        filter(None, (store.queue.take(owner, kind=kind, id=job_id, seconds=_LEASE) for kind in KINDS)), None
    )
    if taken is None:
        return False
    folder = store.home / "jobs" / job_id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = JobRequest.model_validate(taken.payload).root.words(folder, store.home)
    print(f"$ emoloop {' '.join(words)}", flush=True)
    with GuardedProcess(command(words), grace=_GRACE, cwd=folder) as child:
        while child.process.poll() is None:
            try:
                child.process.wait(_RENEW)
            except subprocess.TimeoutExpired:
                if job_id not in store.queue.renew(owner, _LEASE):
                    _cancelled(store, job_id, owner, child)
        code = child.process.returncode
    error = None if code == 0 else f"it ended with exit code {code}: {_last_line(folder / 'log.txt')}"
    store.queue.settle(job_id, owner, "failed" if error else "done", error)
    return True


def _cancelled(store: TraceStore, job_id: str, owner: str, child: GuardedProcess) -> None:
    """Ask the command to end, and hold the job until it has."""
    child.process.terminate()
    deadline = time.monotonic() + _GRACE
    while child.process.poll() is None and time.monotonic() < deadline:
        store.queue.claim(job_id, owner, _LEASE)
        try:
            child.process.wait(_RENEW)
        except subprocess.TimeoutExpired:
            continue
    child.stop()


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
