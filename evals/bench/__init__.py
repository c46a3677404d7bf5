"""Benchmarks: the measurements behind the project's published figures.

A benchmark is a module with `main(**options) -> dict`, plain or async: its keyword arguments are its options on the
command line, its result holds `figures` (a flat map name → number) and any further keys. `run` adds the options,
seeds and device; that is the document that `emoloop bench NAME --json` prints.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import platform
from collections.abc import Callable
from typing import Any

#: Name → dotted path of the function.
BENCHES: dict[str, str] = {
    "bank": ".evals.bench.bank:main",
    "cheat": ".evals.studies.cheat:main",
    "coalesce": ".evals.bench.coalesce:main",
    "concurrency": ".evals.bench.concurrency:main",
    "dataset": ".evals.bench.dataset:main",
    "distill-study": ".evals.studies.distill_study:main",
    "dpo-step": ".evals.bench.dpo_step:main",
    "generator": ".evals.bench.generator:main",
    "lvlm": ".evals.bench.lvlm:main",
    "log": ".evals.bench.log:main",
    "open": ".evals.bench.open_runs:main",
    "overhead": ".evals.bench.overhead:main",
    "ray": ".evals.bench.ray_workers:main",
    "real": ".evals.bench.real:main",
    "sde": ".evals.bench.sde:main",
    "serve": ".service.bench:main",
    "startup": ".evals.bench.startup:main",
    "workers": ".evals.bench.workers:main",
}

#: Former benchmarks → the script in a clone of the repository that does the same.
MOVED = {"kill": "tests/faults/kill.py", "soak": "tests/faults/soak.py"}


def run(name: str, function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        name: For the document.
        function: Its `main`.
        options: Some of its keyword arguments.

    Returns:
        `bench`, `settings` (all its options), `seeds`, `device`, and what `function` returns.
    """
    settings = {key: it.default for key, it in inspect.signature(function).parameters.items()} | options
    document = function(**options)
    if inspect.iscoroutine(document):
        document = asyncio.run(document)
    made_by = {
        "bench": name,
        "settings": settings,
        "seeds": [settings.get("seed", 0)],
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    return made_by | document
