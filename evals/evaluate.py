"""One evaluation, from a suite's name to its files: resolve, refuse what misleads, run, analyse, write."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..agents.rewriters import REWRITERS
from ..domain import Failure, UserError
from ..graph.state import Context
from ..settings import load_settings, merged, pruned
from ..tools.children import GuardedProcess
from ..tools.registry import resolve
from .arms import crossed, load_arm, lookup, planner
from .document import Options, Plan, describe
from .judges import conflict, load_judge, reward_sources
from .ledger import check, record, release_of
from .lookup import Phrases
from .ray_shares import on_ray
from .records import Outcome
from .report import write_report
from .runner import run, settings_of
from .suites import load_suite


def plan(options: Options) -> Plan:
    """Resolve everything that can be wrong before anything is made.

    Raises:
        UserError: An unknown suite, arm, judge or adapter; or a judge that also gave the reward.
    """
    suite = load_suite(options.suite)
    if options.limit:
        suite = suite.limited(options.limit)
    budget = {"loop": {"rounds": suite.rounds, "images": suite.images}}
    settings = load_settings(merged(merged(suite.settings, pruned(options.settings)), budget))
    adapters = suite.adapters | {name: Path(folder) for name, folder in options.adapters.items()}
    if settings.generator.adapter:
        adapters.setdefault("adapter", Path(settings.generator.adapter))
    own = crossed(adapters, options.critic) if suite.cross else suite.adapters
    wanted = options.arms or list(dict.fromkeys([*suite.arms, *own]))
    arms = [load_arm(spec, adapters, options.critic) for spec in [*wanted, *options.more_arms]]
    ours = [settings_of(settings, arm.models) for arm in arms]
    for arm, its in zip(arms, ours, strict=True):
        resolve(Context(**arm.options).over(its.loop)["rewriter"], REWRITERS, "rewriter")
    twice = [name for name, count in Counter(arm.name for arm in arms).items() if count > 1]
    if any(arm.answer in (lookup, planner) for arm in arms):
        Phrases.of_log(settings)
    if twice:
        raise UserError(f"two arms are called {twice[0]!r}: name one of them, NAME={twice[0]}")
    spec = options.judge or suite.judge
    if spec is None:
        raise UserError(
            f"suite {suite.name!r} names no judge: --judge law, lvlm:MODEL, clip:ENCODER,HEAD or human:CSV"
        )
    judge = load_judge(spec, settings)
    guard_spec = options.guard or suite.guard
    guard = load_judge(guard_spec, settings) if guard_spec else None
    clash = conflict(judge, set().union(*map(reward_sources, ours)))
    if clash and not options.allow_reward_judge:
        raise UserError(
            f"judge {judge.name!r} also gave the reward ({clash}), so its word proves nothing here: "
            "choose another with --judge, or add --allow-reward-judge and the report will say so"
        )
    return Plan(suite, settings, arms, judge, guard, clash)


def evaluate(
    options: Options,
    out: Path,
    progress: Progress | None = None,
    processes: int = 1,
    lvlm: Any = None,
    engine: str = "local",
) -> tuple[dict[str, Any], Outcome]:
    """Run the evaluation and write `report.json`, `report.csv` and `report.html` into `out`.

    Args:
        options: What to evaluate.
        out: Folder for the report; made.
        progress: Shows how far it is.
        processes: Above 1, so many share the making, each with a GPU of its own where there are any.
        lvlm: A chat model instead of the settings' one; for a single process.
        engine: `ray` has `ray.actors` actors of a Ray cluster do it, and opens no models here.

    Returns:
        The document (with `figures`) and the rows behind it.

    Raises:
        UserError: As `plan`; `out` cannot be written; or the suite is read once and was.
        Failure: An arm answered nothing at all; what is made is kept.
    """
    ready = plan(options)
    ledger = ready.suite.ledger
    release = ledger and release_of(settings_of(ready.settings, arm.models) for arm in ready.arms)
    if ledger and release:
        check(ledger, ready.suite.name, release, options.again)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    if engine == "ray":
        outcome = on_ray(ready.settings, partial(_share, options))
    else:
        if processes > 1:
            _make_in_processes(options, processes)
        outcome = asyncio.run(
            run(ready.suite, ready.settings, ready.arms, ready.judge, ready.guard, progress, lvlm=lvlm)
        )
    document = describe(ready, outcome, options)
    write_report(document, outcome, out)
    if ledger and release:
        record(ledger, document, release, options.again)
    return document, outcome


def _make_in_processes(options: Options, processes: int) -> None:
    import torch

    devices = torch.cuda.device_count()
    with ExitStack() as started:
        waiting = []
        for which in range(processes):
            environment = dict(os.environ)
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = str(which % devices)
            else:
                # Processes that each take all cores hinder one another.
                environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            arguments = json.dumps(asdict(options) | {"shard": [which, processes]}, default=str)
            command = [sys.executable, "-m", __name__, arguments]
            child = GuardedProcess(command, env=environment, stdout=sys.stderr)
            waiting.append(started.enter_context(child).process)
        codes = [process.wait() for process in waiting]
    if any(codes):
        raise Failure(
            f"{sum(map(bool, codes))} of {processes} processes failed; what is made is kept, run again"
        )


def _share(options: Options, which: int, many: int) -> Outcome:
    """Make and read one of so many shares; what is there already is only looked up."""
    ready = plan(options)
    return asyncio.run(
        run(ready.suite, ready.settings, ready.arms, ready.judge, ready.guard, shard=(which, many))
    )


def main() -> None:
    """A child's share of `--processes`: makes and reads what its options, JSON on the command line, say."""
    given = json.loads(sys.argv[1])
    shard = given.pop("shard")
    try:
        _share(Options(**given), *shard)
    except (UserError, Failure) as error:
        raise SystemExit(f"emoloop: {error}") from None


if __name__ == "__main__":
    main()
