"""Benchmarks: what the bars of the project are measured with.

A benchmark is a module with `main(**options) -> dict`: the document that `emoloop bench NAME --json`
prints, with `figures` (a flat map name → number) and what made them (settings, seeds, n, device). `main`'s
keyword arguments are its options on the command line; its first docstring line is its description.
"""

from __future__ import annotations

#: Name → dotted path of the function.
BENCHES: dict[str, str] = {
    "cheat": ".evals.studies.cheat:main",
    "dataset": ".evals.bench.dataset:main",
    "distill-study": ".evals.studies.distill_study:main",
    "dpo-step": ".evals.bench.dpo_step:main",
    "kill": ".evals.bench.kill:main",
    "lvlm": ".evals.bench.lvlm:main",
    "soak": ".evals.bench.soak:main",
    "startup": ".evals.bench.startup:main",
}
