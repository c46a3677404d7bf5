"""Teams of CPU threads: what ends with a thread, and what one thread's number leaves alone."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emoloop.tools.threads import apart, set_threads_here

BEFORE = torch.get_num_threads()


def work(size: int = 1 << 20) -> float:
    return float(torch.ones(size).add(1).sum())


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_apart_returns_and_raises():
    assert apart(int, "12", base=8) == 10
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 1, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_team_ends_with_its_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(set_threads_here, 3).result()
        start = threads()
        pool.submit(work).result()
        assert threads() == start + 2

    def alone() -> None:
        set_threads_here(3)
        work()

    start = threads()
    apart(alone)
    deadline = time.monotonic() + 10  # the kernel takes its time to bury a thread
    while threads() > start and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threads() <= start


def test_the_number_is_one_threads_alone():
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as old:
        old.submit(work).result()
        here.submit(set_threads_here, BEFORE + 2).result()
        assert here.submit(torch.get_num_threads).result() == BEFORE + 2
        with ThreadPoolExecutor(1) as new:
            found = [torch.get_num_threads(), *(p.submit(torch.get_num_threads).result() for p in (old, new))]
    assert found == [BEFORE] * 3
