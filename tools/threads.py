"""Which threads get a team of CPU threads from torch.

Every thread in which torch works gets an OpenMP team of its own and keeps it while it lives. As soon as the teams of
a process outnumber the cores, GNU OpenMP lets idle members sleep at once, and waking them takes longer than most
operations of a small model: pictures and critiques then take twice as long. So the one thread that samples keeps
a team; whatever else computes for a moment does so in a thread that ends, or alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def apart(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What the call returns, from a thread that ends with it and takes its team along."""
    with ThreadPoolExecutor(1, thread_name_prefix="emoloop-apart") as passing:
        return passing.submit(call, *args, **kwargs).result()


def set_threads_here(count: int) -> None:
    """Size of this thread's team; every other thread keeps its own.

    `torch.set_num_threads` speaks for the calling thread and for those that have not used torch yet. The second
    call gives these back what they had.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    apart(torch.set_num_threads, before)
