"""Child processes end with their parent, however it ends."""

import os
import signal
import subprocess
import sys

import pytest
from emoloop.evals.children import children

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_they_end_when_the_block_breaks_off():
    with pytest.raises(ZeroDivisionError), children() as started:
        started.append(subprocess.Popen(SLEEP))
        _ = 1 / 0
    assert started[0].poll() == -signal.SIGTERM


def test_they_end_when_the_parent_is_asked_to_stop():
    code = f"""
import subprocess
from emoloop.evals.children import children
with children() as started:
    started.append(subprocess.Popen({SLEEP!r}))
    print(started[0].pid, flush=True)
    started[0].wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.terminate()
    assert parent.wait(20) == 128 + signal.SIGTERM
    parent.stdout.close()
    # The parent waited for it, so there is not even a zombie left.
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
