"""Child processes that end when this one does, however it does.

    python children.py FD GRACE COMMAND…      FD: the reading end of a pipe whose other end emoloop holds

Between emoloop and the command stands this file as a program, the guard. It gives the command a process group of its
own; when the pipe closes, because emoloop let go of it or was killed, it asks the command to end, and then ends
whatever is left of the group. Standard library only: the guard may run in another environment than emoloop's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any


class GuardedProcess:
    """A command that ends when this process does; a context manager that ends it.

    Attributes:
        process: The guard; its exit code is the command's.
    """

    def __init__(
        self,
        line: Sequence[str],
        *,
        python: str | os.PathLike[str] = sys.executable,
        env: Mapping[str, str] | None = None,
        grace: float = 20.0,
        **streams: Any,
    ):
        """Start it.

        Args:
            line: The command.
            python: Runs the guard.
            env: The command's environment; this process's when None.
            grace: Seconds that the command has to end by itself when it is asked to.
            **streams: As for `subprocess.Popen`.
        """
        read, self._write = os.pipe()
        try:
            self.process: subprocess.Popen[Any] = subprocess.Popen(
                [str(python), "-IS", __file__, str(read), str(grace), *line],
                pass_fds=(read,),
                start_new_session=True,  # Ctrl-C is ours to handle
                env=env,
                **streams,
            )
        finally:
            os.close(read)

    def stop(self) -> int:
        """Let go of the pipe and wait until nothing is left; may be called twice. Returns the exit code."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1
        return self.process.wait()

    def __enter__(self) -> GuardedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _prepare() -> None:
    """What the command begins with. On Linux: if even the guard is killed, the kernel ends the command."""
    # A shell ignores it for what a script runs in the background, and so would all that comes after.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def main(pipe: int, grace: float, command: list[str]) -> int:
    """Run `command` until it ends or the pipe closes; returns its exit code."""
    child = subprocess.Popen(
        command,
        process_group=0,
        preexec_fn=_prepare,  # safe: the guard has one thread so far
    )

    def end(*_: object) -> None:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        end()
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    # Workers may outlive their leader; its group's name stays theirs as long as there is one.
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace / 4
        try:
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                time.sleep(0.05)
                os.killpg(child.pid, 0)
        except (ProcessLookupError, PermissionError):
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
