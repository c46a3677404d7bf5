"""Teams of CPU threads: what ends with a thread, and what one thread's number leaves alone."""

import subprocess
import sys
import threading
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


def test_apart_runs_in_a_thread_that_has_ended_after_it():
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


TEAMS = """
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emoloop.tools.threads import apart, set_threads_here


def threads():
    return {path.name for path in Path("/proc/self/task").iterdir()}


def work():
    torch.ones(1 << 20).add(1)


def team():
    before = threads()
    set_threads_here(3)
    work()
    return threads() - before


with ThreadPoolExecutor(1) as pool:
    pool.submit(set_threads_here, 3).result()
    before = threads()
    pool.submit(work).result()  # all of it there: a tensor made here would start a team of this thread's own
    assert len(threads() - before) >= 2

members = apart(team)
assert len(members) >= 2, members
while members & threads():  # the kernel takes its time to bury a thread, on a busy machine a long one
    time.sleep(0.02)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads threads from /proc")
def test_a_team_ends_with_its_thread():
    # In a process of its own, and by the members' names: other threads may come and go meanwhile.
    done = subprocess.run([sys.executable, "-c", TEAMS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_number_is_one_threads_alone():
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as old:
        old.submit(work).result()
        here.submit(set_threads_here, BEFORE + 2).result()
        assert here.submit(torch.get_num_threads).result() == BEFORE + 2
        with ThreadPoolExecutor(1) as new:
            found = [torch.get_num_threads(), *(p.submit(torch.get_num_threads).result() for p in (old, new))]
    assert found == [BEFORE] * 3
