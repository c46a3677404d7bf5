"""From prompts to an adapter, online: what `emoloop train flow-grpo` and a Python program call.

    from emoloop.rl.online.train import train_flow_grpo
    train_flow_grpo(settings, load_config("flow-grpo", "miniature"), Path("runs/grpo"), requests)

Every process that `accelerate launch` started samples and trains its share; the first one asks the critic and writes.
Trainer, checkpoints, guards and artifact are those of `rl/distill.py`, and what is sampled goes to the log as the
loop's pictures do. `policy.previous` is the adapter that it starts from.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from anyio.from_thread import start_blocking_portal

from ...agents.critic import critic_of
from ...domain import EmotionTarget, UserError
from ...files import write_atomic
from ...settings import Settings
from ...tools.lvlm.load import load_lvlm
from ...tools.reward import load_reward
from ...traces.recorder import open_recorder
from ...traces.rows import RunFilter
from ...traces.store import open_store
from ..checkpoint import check_folder
from ..config import DistillConfig, changed
from ..data.examples import Example
from ..data.loader import Loader
from ..data.split import held_out, normal
from ..distill import Distilled, Origin, load_base, make_policy, train_into
from ..guards import Guards
from ..launch import make_accelerator
from ..objectives import load_objective
from ..rollouts import Base
from ..trainer import Trainer, Watcher
from .collect import TOLERANCE, Collector, Rows
from .judging import Judging
from .objective import FlowGRPO

Requests = Sequence[tuple[str, EmotionTarget]]


def logged_requests(settings: Settings, where: RunFilter | None = None) -> list[tuple[str, EmotionTarget]]:
    """The different prompts and targets of the log's runs.

    Raises:
        UserError: There are none.
    """
    with open_store(settings, read_only=True) as store:
        rows = store.runs(where)
    if not rows:
        raise UserError("no run of the log answers to --where: name a file of prompts, or widen it")
    return [
        (row.prompt, EmotionTarget(valence=row.valence, arousal=row.arousal, category=row.category))
        for row in rows
    ]


def train_flow_grpo(
    settings: Settings,
    config: DistillConfig,
    out: Path,
    requests: Requests,
    *,
    resume: bool = False,
    watch: Watcher | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Distilled:
    """Train by Flow-GRPO and write the artifact.

    Args:
        settings: Generator, LVLM and log.
        config: Everything about the training; its objective is `flow-grpo`.
        out: The artifact's folder.
        requests: Neutral prompts and targets; `data.held_out` of the prompts are for the guards alone.
        resume: Go on from the newest checkpoint in `out` (or begin, where there is none).
        watch: Called after each step.
        warn: Called with each note before training begins.

    Raises:
        UserError: Wrong input, before anything is trained.
        Failure: Training broke off; the last good checkpoint is intact.
    """
    training = out / "training"
    check_folder(out, training / "config.yaml", resume, lambda then: changed(then, config))
    accelerator = make_accelerator(config, training)
    main = accelerator.is_main_process
    objective = _objective(config, accelerator.num_processes)
    train, kept, data = _divided(requests, config)
    reward = load_reward(objective.reward)
    generator = load_base(settings, config, Base(settings.generator.model, None, None), accelerator.device)
    with accelerator.main_process_first():  # which makes the log where there is none
        recorder = open_recorder(settings)
    lvlm = load_lvlm(settings.lvlm) if main else None
    try:
        policy, cache = make_policy(settings, config, generator, recorder.store, None)
        objective.sde(policy)  # what it refuses, it refuses before the folder is taken
        about = generator.describe()
        base = Base(about["model"], about["revision"], policy.previous_id)
        guards = Guards(config.guard, policy, cache, kept) if config.guard.every and kept else None
        notes = [] if kept else [f"no prompt is held out (data.held_out={config.data.held_out}): no guard"]
        for note in notes if main else ():
            warn(note)
        sampling = objective.model_dump(mode="json") | {"previous": base.adapter}
        judging = lvlm and Judging(
            critic_of(lvlm, settings.lvlm), reward, recorder, generator, sampling, objective.patience
        )
        load = Loader(objective.required_keys, cache, policy.device)
        name = _name(training, resume) if main else ""
        [name] = broadcast_object_list([name])
        with start_blocking_portal() as portal:
            collector = Collector(
                objective, policy, cache, train, reward, judging, portal.start_task_soon, accelerator, name=name,
                base=base, seed=config.train.seed,
            )  # fmt: skip
            precision = config.train.precision
            rows = Rows(collector, objective, policy, load, config.train.batch_size, TOLERANCE[precision])
            trainer = Trainer(
                config, objective, policy, rows, held_out=None, text=None, cache=cache, guards=guards,
                folder=training, data_hash=data["data_hash"], accelerator=accelerator,
            )  # fmt: skip
            origin = Origin(
                about, base, collector.reward, collector.critics(), "online", {**data, "name": name}
            )
            return train_into(out, trainer, generator, origin, notes, resume=resume, watch=watch)
    finally:
        recorder.close()
        if lvlm is not None:
            lvlm.close()


def _objective(config: DistillConfig, processes: int) -> FlowGRPO:
    knobs = dict(config.objective)
    objective = load_objective(knobs.pop("name"), knobs)
    if not isinstance(objective, FlowGRPO):
        raise UserError(
            f"objective {config.objective['name']!r} is no Flow-GRPO: train it by `emoloop distill`"
        )
    train = config.train
    taken = objective.updates * train.batch_size * train.accumulation * processes
    if objective.rows != taken:
        many = " · processes" if processes > 1 else ""
        raise UserError(
            f"a collection has {objective.rows} rows (objective.groups · group · window), and {objective.updates} "
            f"updates take {taken} (updates · train.batch_size · train.accumulation{many}): make both equal"
        )
    if objective.groups % processes:
        raise UserError(f"objective.groups has to be a multiple of the processes ({processes})")
    for name in ("steps", "checkpoint_every"):
        if getattr(train, name) % objective.updates:
            raise UserError(f"train.{name} has to be a multiple of objective.updates ({objective.updates})")
    if config.policy.dropout:
        raise UserError("policy.dropout: flow-grpo compares densities of one network, set it to 0")
    return objective


def _divided(requests: Requests, config: DistillConfig) -> tuple[Requests, list[Example], dict[str, Any]]:
    """The requests that train, in one order, those that guard, and what is recorded of both."""
    told = {(prompt, target.model_dump_json()): target for prompt, target in requests}
    different = [(prompt, target) for (prompt, _), target in sorted(told.items())]
    knobs = config.data
    sides: tuple[list[Any], list[Any]] = [], []
    for prompt, target in different:
        sides[held_out(normal(prompt), knobs.held_out, knobs.split_salt)].append((prompt, target))
    train, kept = sides
    if not train:
        raise UserError(
            f"all {len(different)} requests are held out: lower data.held_out, or give more prompts"
        )
    digest = hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()
    data = {
        "data_hash": digest, "runs": len(train), "prompts": len({normal(prompt) for prompt, _ in train}),
        "held_out": len(kept),
    }  # fmt: skip
    return train, [Example("", prompt, target) for prompt, target in kept], data


def _name(training: Path, resume: bool) -> str:
    """What the training's runs are called in the log; the same when it goes on."""
    file = training / "name"
    if resume and file.exists():
        return file.read_text().strip()
    name = f"grpo-{uuid.uuid4().hex[:8]}"
    write_atomic(file, f"{name}\n")
    return name
