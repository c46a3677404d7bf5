"""Stands between emoloop and a vLLM process tree, so that no end of emoloop leaves a server behind.

    python guard.py FD COMMAND…        FD: the reading end of a pipe whose other end emoloop holds

vLLM is several processes. The guard gives them a process group of their own; when the pipe closes, because
emoloop let go of it or was killed, it asks the command to end, and then ends whatever is left of the group.
Standard library only: it runs in vLLM's environment.
"""

import os
import signal
import subprocess
import sys
import threading
import time

#: Seconds that the command has to end by itself, and its workers after it.
GRACE = 20.0


def die_with_guard() -> None:
    """On Linux: if even the guard is killed, the kernel ends the command."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def main(pipe: int, command: list[str]) -> int:
    """Run `command` until it ends or the pipe closes; returns its exit code."""
    child = subprocess.Popen(
        command,
        process_group=0,
        preexec_fn=die_with_guard,  # safe: the guard has one thread so far
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
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    # Workers may outlive their leader; its group's name stays theirs as long as there is one.
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE / 4
        try:
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                time.sleep(0.05)
                os.killpg(child.pid, 0)
        except (ProcessLookupError, PermissionError):
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
