"""The distillation study: objectives × training seeds on one log, then one evaluation of all of them.

Resumable at every point: a finished adapter is not trained again, a half-trained one goes on from its newest
checkpoint, and the evaluation keeps everything it made by content. The adapters lie at
`out/<objective>-<seed>`, the document at `out/study.json`.

In its figures an objective's arm is the mean over the training seeds, request by request, so that an interval
is over prompts as for every other arm; `<objective>_error_seed_std` says how far the seeds lie apart.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...domain import UserError
from ...rl.config import changed, load_config
from ...tools.children import GuardedProcess
from .. import analysis
from ..evaluate import Options
from ..evaluate import evaluate as run_evaluation
from ..stats import Estimate, estimate

#: Seconds that a training has to end its step and save when the study is stopped.
GRACE = 600.0


def main(
    out: str = "runs/distill-study",
    home: str = "",
    suite: str = "distill",
    objectives: str = "opd,dpo,nft,rwr,sft",
    controls: str = "base,rewrite,best_of_n,rewrite_best_of_n,teacher,loop",
    seeds: int = 3,
    preset: str = "miniature",
    where: str = "",
    sets: str = "",
    parallel: int = 1,
    evaluate: bool = True,
) -> dict[str, Any]:
    """Train every objective with every seed and judge them all side by side.

    Args:
        out: Folder of the study.
        home: Folder of the log; empty takes the settings' one.
        suite: Suite of held-out requests; its neutral prompts should not be in the log.
        objectives: Names, separated by commas; `dpo:1` takes another number of seeds than `seeds`.
        controls: Arms to compare them with.
        seeds: Training seeds 0 … seeds - 1.
        preset: Distillation preset.
        where: Which runs, as `emoloop distill --from`.
        sets: `key=value` separated by spaces, as `--set`.
        parallel: Trainings at once, each in a process of its own with one thread.
        evaluate: False trains only.

    Returns:
        The document with `figures`: those of the evaluation with each objective's mean over seeds, and
        `<objective>_train_minutes`.
    """
    counts, beside = _counts(objectives, seeds), [it.strip() for it in controls.split(",") if it.strip()]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    cells = {
        (name, seed): folder / f"{name}-{seed}"
        for seed in range(max(counts.values()))
        for name in counts
        if seed < counts[name]
    }
    for (name, seed), place in cells.items():
        _check_settings(place, name, seed, preset, sets.split())
    words = ["--resume", "--preset", preset, *(word for item in sets.split() for word in ("--set", item))]
    words += [*(["--from", where] if where else []), *(["--home", home] if home else [])]
    _train_all(cells, words, parallel)
    records = {cell: json.loads((place / "training.json").read_text()) for cell, place in cells.items()}
    hashes = {record["data"]["data_hash"] for record in records.values()}
    if len(hashes) > 1:
        raise UserError(f"{folder} holds adapters trained on {len(hashes)} different logs: use another out=")
    document = _judge(counts, beside, cells, folder, home, suite) if evaluate else {"figures": {}}
    for name, count in counts.items():
        seconds = [records[name, seed]["outcome"]["seconds"] for seed in range(count)]
        document["figures"][f"{name}_train_minutes"] = float(np.mean(seconds)) / 60
    if "opd" in counts:
        document["figures"]["train_minutes"] = document["figures"]["opd_train_minutes"]
    first = records[next(iter(cells))]
    given = {"preset": preset, "suite": suite, "where": where, "sets": sets}
    usual = {key: it.default for key, it in inspect.signature(main).parameters.items()}
    options = {
        "objectives": ",".join(f"{name}:{count}" for name, count in counts.items()),
        "controls": controls,
    }
    options |= {key: shlex.quote(it) for key, it in given.items() if it != usual[key]}
    document |= {
        "command": " ".join(["emoloop bench distill-study", *(f"{k}={it}" for k, it in options.items())]),
        "trainings": {
            f"{name}-{seed}": {key: record[key] for key in ("objective", "outcome", "figures", "notes")}
            for (name, seed), record in records.items()
        },
        **{key: first[key] for key in ("data", "base", "reward")},
        "seeds": {name: list(range(count)) for name, count in counts.items()},
    }
    text = json.dumps(document, indent=1, default=str)
    (folder / "study.json").write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def _counts(objectives: str, seeds: int) -> dict[str, int]:
    """Seeds of each objective.

    Raises:
        UserError: None is named, or a number is none.
    """
    counts: dict[str, int] = {}
    for part in filter(None, (it.strip() for it in objectives.split(","))):
        name, _, own = part.partition(":")
        count = own or str(seeds)
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"objectives={objectives}: {part!r} is not NAME or NAME:SEEDS, such as opd:3")
        counts[name] = int(count)
    if not counts:
        raise UserError("objectives= names none: opd, dpo, nft, rwr or sft")
    return counts


def _check_settings(place: Path, name: str, seed: int, preset: str, sets: Sequence[str]) -> None:
    """Refuse to judge an adapter that is there but was trained with other settings.

    Raises:
        UserError: It was.
    """
    path = place / "training.json"
    if not path.exists():
        return
    asked = load_config(name, preset, sets=[f"train.seed={seed}", *sets])
    if other := changed(json.loads(path.read_text())["config"], asked):
        raise UserError(f"{place} was trained with other settings of {', '.join(other)}: use another out=")


def _train_all(cells: Mapping[tuple[str, int], Path], words: Sequence[str], parallel: int) -> None:
    """Each training is a child process: memory is given back, and several may run at once."""
    environment = {**os.environ}
    if parallel > 1:
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    waiting = [cell for cell, place in cells.items() if not (place / "training.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen[Any]] = {}
    with ExitStack() as started:
        while waiting or running:
            while waiting and len(running) < max(1, parallel):
                name, seed = cell = waiting.pop(0)
                place = cells[cell]
                command = [sys.executable, "-m", "emoloop.cli", "distill", name, "--out", str(place), *words]
                command += ["--set", f"train.seed={seed}"]
                print(f"training {name}, seed {seed} ({len(waiting)} waiting)", file=sys.stderr, flush=True)
                with place.with_suffix(".log").open("ab") as log:
                    child = GuardedProcess(command, env=environment, grace=GRACE, stdout=log, stderr=log)
                running[cell] = started.enter_context(child).process
            for cell in [cell for cell, child in running.items() if child.poll() is not None]:
                if code := running.pop(cell).returncode:
                    lines = cells[cell].with_suffix(".log").read_text(errors="replace").splitlines()
                    last = lines[-1] if lines else f"exit code {code}"
                    raise UserError(f"training {cell[0]}, seed {cell[1]} failed: {last}")
            time.sleep(0.5)


def _judge(
    counts: dict[str, int],
    beside: Sequence[str],
    cells: Mapping[tuple[str, int], Path],
    folder: Path,
    home: str,
    suite: str,
) -> dict[str, Any]:
    groups = {name: [f"{name}_{seed}" for seed in range(count)] for name, count in counts.items()}
    trained = [f"{name}_{seed}={cells[name, seed]}" for name in counts for seed in range(counts[name])]
    options = Options(suite=suite, arms=[*beside, *trained], settings={"home": home or None})
    document, outcome = run_evaluation(options, folder / "report")
    table = analysis.Table(outcome.rows, outcome.pace)
    spreads = average(table, groups)
    document["figures"] = {**document["figures"], **analysis.figures(table), **spreads}
    # The single seeds' rows, sweeps and failures stand in the report.
    found = table.estimates()
    means = {name: {"metrics": {key: asdict(it) for key, it in found[name].items()}} for name in counts}
    document["arms"] = {arm: document["arms"][arm] for arm in beside} | means
    document["comparisons"] = table.comparisons()
    document["verdicts"] = verdicts(table, list(counts))
    return document


def average(table: analysis.Table, groups: dict[str, list[str]]) -> dict[str, float]:
    """Put the mean over training seeds into a table of arms, request by request.

    Args:
        table: Gets a column set for each group.
        groups: New arm → the arms of its seeds.

    Returns:
        `<arm>_<metric>_seed_std` for error and subject accuracy: standard deviation of the seeds' means.
    """
    figures: dict[str, float] = {}
    for arm, members in groups.items():
        merged: dict[str, analysis.Column] = {}
        for metric, first in table.columns[members[0]].items():
            columns = [table.columns[member].get(metric) for member in members]
            if any(column is None or column.units != first.units for column in columns):
                continue
            values = [
                None if any(value is None for value in row) else float(np.mean(row))
                for row in zip(*(column.values for column in columns if column), strict=True)
            ]
            merged[metric] = analysis.Column(values, first.units, first.clusters)
            if metric in ("error", "subject_accuracy") and len(members) > 1:
                means = [np.mean([v for v in column.values if v is not None]) for column in columns if column]
                figures[f"{arm}_{metric}_seed_std"] = float(np.std(means, ddof=1))
        table.columns[arm] = merged
        table.arms.append(arm)
    return figures


def verdicts(table: analysis.Table, names: Sequence[str]) -> dict[str, Any]:
    """Each objective's model against base, rewrite, teacher and loop, as estimates with intervals."""
    return {name: {key: it.figures("value") for key, it in _verdicts(table, name)} for name in names}


def _verdicts(table: analysis.Table, name: str) -> Iterator[tuple[str, Estimate]]:
    if table.has(name, "base", "loop"):
        yield "amortisation", table.amortisation(name)
    if table.has(name, "base", "teacher"):
        columns, clusters = table.paired("error", "base", name, "teacher")
        share = estimate(columns, clusters, lambda base, ours, teacher: (base - ours) / (base - teacher))
        yield "share_of_teacher", share
    if table.has(name, "rewrite"):
        yield "error_against_rewrite", table.difference("error", name, "rewrite")[0]
    if table.has(name, "base", metric="subject_accuracy"):
        yield "subject_against_base", table.difference("subject_accuracy", name, "base")[0]
    if table.has(name, "teacher", metric="diversity"):
        yield "diversity_of_teacher", table.ratio("diversity", name, "teacher")
