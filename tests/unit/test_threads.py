"""Teams of CPU threads: what ends with a thread, and what one thread's number leaves alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emoloop.tools.threads import apart, set_threads_here

BEFORE = torch.get_num_threads()


def work(size: int = 1 << 20) -> float:
    return float(torch.ones(size).add(1).sum())


def test_apart_returns_and_raises():
    assert apart(int, "12", base=8) == 10
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 1, 0)


COUNTED = """
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emoloop.tools.threads import apart, set_threads_here


def threads():
    return {task.name for task in Path("/proc/self/task").iterdir()}


def work():
    torch.ones(1 << 20).add(1)


def alone():
    set_threads_here(3)
    work()


with ThreadPoolExecutor(1) as pool:
    pool.submit(set_threads_here, 3).result()
    # Named, not counted: threads that the libraries started may end at any time.
    before = threads()
    pool.submit(work).result()  # all of it there: a tensor made here would start a team of this thread's own
    team = threads() - before
    assert len(team) == 2, team

before = threads()
apart(alone)
deadline = time.monotonic() + 120  # the kernel takes its time to bury a thread
while threads() - before and time.monotonic() < deadline:
    time.sleep(0.02)
assert not threads() - before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_team_ends_with_its_thread():
    # In a process of its own: threads that other tests left may end while they are counted.
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_number_is_one_threads_alone():
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as old:
        old.submit(work).result()
        here.submit(set_threads_here, BEFORE + 2).result()
        assert here.submit(torch.get_num_threads).result() == BEFORE + 2
        with ThreadPoolExecutor(1) as new:
            found = [torch.get_num_threads(), *(p.submit(torch.get_num_threads).result() for p in (old, new))]
    assert found == [BEFORE] * 3
