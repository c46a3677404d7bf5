"""Child processes that end with us: nobody wants a training to go on after its study was stopped."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list for started processes; those that still run when the block is left are asked to stop, and waited for.

    Left also means: this process was asked to stop. A plain SIGTERM would end it without a look at the block's end.
    """
    started: list[subprocess.Popen[bytes]] = []
    # Only the main thread may hear signals.
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if ours else None
    try:
        yield started
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
        for child in started:
            if child.poll() is None:
                child.terminate()
        for child in started:
            child.wait()
