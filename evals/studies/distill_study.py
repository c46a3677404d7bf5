"""The distillation study: objectives × training seeds on one log, then one evaluation of all of them.

Resumable at every point: a finished adapter is not trained again, a half-trained one goes on from its newest
checkpoint, and the evaluation keeps everything it made by content. Killing it costs minutes. The adapters lie at
`out/<objective>-<seed>`, the document at `out/study.json`.

In its figures an objective's arm is the mean over the training seeds, request by request, so that an interval
is over prompts as for every other arm; `<objective>_error_seed_std` says how far the seeds lie apart.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...domain import UserError
from ...tools.children import GuardedProcess

if TYPE_CHECKING:
    from ..analysis import Table

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
    cells = [(name, seed) for seed in range(max(counts.values())) for name in counts if seed < counts[name]]
    for cell in cells:
        _check_settings(_place(folder, *cell), *cell, preset, sets.split())
    _train_all(cells, folder, home, preset, where, sets.split(), parallel)
    records = {cell: json.loads((_place(folder, *cell) / "training.json").read_text()) for cell in cells}
    hashes = {record["data"]["data_hash"] for record in records.values()}
    if len(hashes) > 1:
        raise UserError(f"{folder} holds adapters trained on {len(hashes)} different logs: use another out=")
    minutes = {
        f"{name}_train_minutes": float(
            np.mean([records[name, seed]["outcome"]["seconds"] / 60 for seed in range(count)])
        )
        for name, count in counts.items()
    }
    document: dict[str, Any] = {"figures": {}}
    if evaluate:
        document = _judge(counts, beside, folder, home, suite)
    document["figures"] |= minutes
    if "opd" in counts:
        document["figures"]["train_minutes"] = minutes["opd_train_minutes"]
    document["trainings"] = {
        f"{name}-{seed}": {key: record[key] for key in ("objective", "outcome", "figures", "notes")}
        for (name, seed), record in records.items()
    }
    first = next(iter(records.values()))
    taken = ",".join(f"{name}:{count}" for name, count in counts.items())
    others = {
        "preset": (preset, "miniature"),
        "suite": (suite, "distill"),
        "where": (where, ""),
        "sets": (sets, ""),
    }
    said = "".join(f" {key}={shlex.quote(it)}" for key, (it, default) in others.items() if it != default)
    document |= {
        "command": f"emoloop bench distill-study objectives={taken} controls={controls}{said}",
        "data": first["data"],
        "base": first["base"],
        "reward": first["reward"],
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
    from ...rl.config import load_config

    path = place / "training.json"
    if not path.exists():
        return
    asked = load_config(name, preset, sets=[f"train.seed={seed}", *sets]).model_dump(mode="json")
    taken = json.loads(path.read_text())["config"]
    other = sorted(key for key in asked | taken if asked.get(key) != taken.get(key))
    if other:
        raise UserError(f"{place} was trained with other settings of {', '.join(other)}: use another out=")


def _place(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}"


def _train_all(
    cells: Sequence[tuple[str, int]],
    folder: Path,
    home: str,
    preset: str,
    where: str,
    sets: Sequence[str],
    parallel: int,
) -> None:
    """Each training is a child process: memory is given back, and several may run at once."""
    waiting = [cell for cell in cells if not (_place(folder, *cell) / "training.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen[Any]] = {}
    with ExitStack() as started:
        while waiting or running:
            while waiting and len(running) < max(1, parallel):
                cell = waiting.pop(0)
                name, seed = cell
                command = [
                    sys.executable,
                    "-m",
                    "emoloop.cli",
                    "distill",
                    name,
                    "--out",
                    str(_place(folder, *cell)),
                ]
                command += ["--resume", "--preset", preset, "--set", f"train.seed={seed}"]
                command += [word for item in sets for word in ("--set", item)]
                command += ["--from", where] if where else []
                command += ["--home", home] if home else []
                environment = {**os.environ}
                if parallel > 1:
                    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
                print(f"training {name}, seed {seed} ({len(waiting)} waiting)", file=sys.stderr, flush=True)
                with (folder / f"{name}-{seed}.log").open("ab") as log:
                    child = GuardedProcess(command, env=environment, grace=GRACE, stdout=log, stderr=log)
                running[cell] = started.enter_context(child).process
            for cell, child in list(running.items()):
                if (code := child.poll()) is not None:
                    del running[cell]
                    if code:
                        lines = (folder / f"{cell[0]}-{cell[1]}.log").read_text(errors="replace").splitlines()
                        last = lines[-1] if lines else f"exit code {code}"
                        raise UserError(f"training {cell[0]}, seed {cell[1]} failed: {last}")
            time.sleep(0.5)


def _judge(
    counts: dict[str, int], beside: Sequence[str], folder: Path, home: str, suite: str
) -> dict[str, Any]:
    from .. import analysis
    from ..evaluate import Options, evaluate

    groups = {name: [f"{name}_{seed}" for seed in range(count)] for name, count in counts.items()}
    trained = [
        f"{arm}={_place(folder, name, seed)}"
        for name, members in groups.items()
        for seed, arm in enumerate(members)
    ]
    options = Options(suite=suite, arms=[*beside, *trained], settings={"home": home or None})
    document, outcome = evaluate(options, folder / "report")
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


def average(table: Table, groups: dict[str, list[str]]) -> dict[str, float]:
    """Put the mean over training seeds into a table of arms, request by request.

    Args:
        table: Gets a column set for each group.
        groups: New arm → the arms of its seeds.

    Returns:
        `<arm>_<metric>_seed_std` for error and subject accuracy: standard deviation of the seeds' means.
    """
    from ..analysis import Column

    figures: dict[str, float] = {}
    for arm, members in groups.items():
        merged: dict[str, Column] = {}
        for metric, first in table.columns[members[0]].items():
            columns = [table.columns[member].get(metric) for member in members]
            if any(column is None or column.units != first.units for column in columns):
                continue
            values = [
                None if any(value is None for value in row) else float(np.mean(row))
                for row in zip(*(column.values for column in columns if column), strict=True)
            ]
            merged[metric] = Column(values, first.units, first.clusters)
            if metric in ("error", "subject_accuracy") and len(members) > 1:
                means = [np.mean([v for v in column.values if v is not None]) for column in columns if column]
                figures[f"{arm}_{metric}_seed_std"] = float(np.std(means, ddof=1))
        table.columns[arm] = merged
        table.arms.append(arm)
    return figures


def verdicts(table: Table, names: Sequence[str]) -> dict[str, Any]:
    """What a distilled model has to show, as numbers with intervals: one entry for each objective."""
    from ..stats import estimate

    found: dict[str, Any] = {}
    for name in names:
        entry: dict[str, Any] = {}
        if table.has(name, "base", "loop"):
            entry["amortisation"] = table.amortisation(name).figures("value")
        if table.has(name, "base", "teacher"):
            columns, clusters = table.paired("error", "base", name, "teacher")
            share = estimate(columns, clusters, lambda base, ours, teacher: (base - ours) / (base - teacher))
            entry["share_of_teacher"] = share.figures("value")
        if table.has(name, "rewrite"):
            entry["error_against_rewrite"] = table.difference("error", name, "rewrite")[0].figures("value")
        if table.has(name, "base", metric="subject_accuracy"):
            entry["subject_against_base"] = table.difference("subject_accuracy", name, "base")[0].figures(
                "value"
            )
        if table.has(name, "teacher", metric="diversity"):
            entry["diversity_of_teacher"] = table.ratio("diversity", name, "teacher").figures("value")
        found[name] = entry
    return found
