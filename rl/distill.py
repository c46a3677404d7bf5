"""From a log to an adapter: what `emoloop distill` and a Python program call.

    from emoloop.rl.distill import distill
    result = distill(settings, load_config("opd", preset="miniature"), Path("runs/opd"))
    result.folder   # an artifact: emoloop run --adapter runs/opd

The folder is the artifact (LoRA, emotion tokens, visual prompts, card, `training.json`); what only the training needs
lies under `training/` in it. This module never imports the graph: a training job knows the log and nothing else.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ..domain import UserError
from ..files import write_atomic
from ..settings import Settings
from ..tools.bank.bank import Bank
from ..tools.diffusion.adapter import load_artifact, save_artifact
from ..tools.diffusion.conditioners import EmotionConditioner
from ..tools.diffusion.families import family_of
from ..tools.diffusion.visual import VisualConditioner
from ..tools.fingerprint import versions
from ..tools.images.diffusers import DiffusersGenerator
from ..tools.images.load import load_generator
from ..traces.rows import RunFilter
from ..traces.store import TraceStore, open_store
from .checkpoint import check_folder
from .config import DistillConfig, changed
from .data.cache import Cache
from .data.dataset import Dataset
from .data.examples import source_for
from .guards import Guards
from .launch import make_accelerator
from .objectives import load_objective
from .objectives.base import Objective
from .policy import PREVIOUS, STUDENT, Policy
from .rollouts import Base, LogRollouts
from .trainer import Outcome, Trainer, Watcher
from .warm_start import TEXT

_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Distilled:
    """What a distillation left.

    Attributes:
        folder: The artifact.
        outcome: How training ended.
        statistics: What the data held, as JSON.
        figures: Flat numbers for reports.
        notes: What a person should know before trusting the result.
        main: Whether this process is the one that writes and tells.
    """

    folder: Path
    outcome: Outcome
    statistics: dict[str, Any]
    figures: dict[str, float]
    notes: list[str]
    main: bool = True


def objective_of(config: DistillConfig) -> tuple[Objective, str]:
    """The configured objective, and the source of examples that has what it needs.

    Raises:
        UserError: Unknown objective or knob, or it needs more than the traces hold.
    """
    knobs = dict(config.objective)
    objective = load_objective(knobs.pop("name"), knobs)
    return objective, source_for(objective.required_keys, config.data)


def distill(
    settings: Settings,
    config: DistillConfig,
    out: Path,
    where: RunFilter | None = None,
    *,
    resume: bool = False,
    watch: Watcher | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Distilled:
    """Train on the log of `settings.home` and write the artifact.

    Args:
        settings: Where the log lies; `generator` settings (device, size, steps) hold for the base model.
        config: Everything about the training.
        out: The artifact's folder.
        where: Which runs.
        resume: Go on from the newest checkpoint in `out` (or begin, where there is none).
        watch: Called after each step.
        warn: Called with each note before training begins.

    Raises:
        UserError: Wrong input, before anything is trained.
        Failure: Training broke off; the last good checkpoint is intact.
    """
    objective, source = objective_of(config)
    training = out / "training"
    check_folder(out, training / _CONFIG, resume, lambda then: changed(then, config))
    with open_store(settings, read_only=True) as store:
        dataset = Dataset(LogRollouts(store, where), config.data)
        train, held_out = dataset.examples(source), dataset.examples(source, "held_out")
        text = dataset.examples(source_for(TEXT, config.data)) if config.train.text_steps else None
        accelerator = make_accelerator(config, training)
        generator = load_base(settings, config, dataset.base, accelerator.device)
        # What reads wishes alone may start from any adapter: nothing that another model made is learned from.
        free = config.policy.previous is not None and objective.required_keys <= {"prompt", "text", "target"}
        policy, cache = make_policy(settings, config, generator, store, None if free else dataset.base)
        guards = _guards(config, policy, cache, dataset)
        statistics = dataset.statistics.model_dump(mode="json")
        notes = _notes(config, len(held_out), dataset.statistics.prompts, guards is not None)
        for note in notes if accelerator.is_main_process else ():
            warn(note)
        about, critics = generator.describe(), dataset.rollouts.critics()
        trainer = Trainer(
            config, objective, policy, train, held_out, text, cache, guards, training,
            statistics["data_hash"], accelerator,
        )  # fmt: skip
        origin = Origin(about, dataset.base, dataset.reward, critics, source, statistics)
        return train_into(out, trainer, generator, origin, notes, resume=resume, watch=watch)


class Origin(NamedTuple):
    """Where the data of a training come from, for the record.

    Attributes:
        about: What the generator says of itself, before several processes share its weights.
        base: What the student starts from.
        reward: Name and version.
        critics: The models whose readings the rewards come from.
        source: What kind of examples.
        data: Statistics, with `data_hash`, as JSON.
    """

    about: dict[str, Any]
    base: Base
    reward: tuple[str, str]
    critics: list[str]
    source: str
    data: dict[str, Any]


def train_into(
    out: Path,
    trainer: Trainer,
    generator: DiffusersGenerator,
    origin: Origin,
    notes: list[str],
    *,
    resume: bool,
    watch: Watcher | None,
) -> Distilled:
    """Train, and write the artifact; the folder was checked."""
    config, training = trainer.config, out / "training"
    # From here on the folder is taken: what is refused, is refused before.
    if trainer.is_main:
        write_atomic(training / _CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_atomic(training / "data.json", json.dumps(origin.data, indent=2) + "\n")
    outcome = trainer.run(resume=resume, watch=watch)
    with trainer.averaged():
        record = _record(config, trainer.objective, origin, outcome, notes)
        parts = trainer.parts()
        if trainer.is_main and outcome.reason != "interrupted":
            save_artifact(
                out, generator.pipe, adapter_name=STUDENT, training=record, base_model=origin.about["model"],
                call=origin.about["call"], **parts,
            )  # fmt: skip
    return Distilled(out, outcome, origin.data, record["figures"], notes, trainer.is_main)


def make_policy(
    settings: Settings,
    config: DistillConfig,
    generator: DiffusersGenerator,
    store: TraceStore,
    base: Base | None,
) -> tuple[Policy, Cache]:
    """The policy over a loaded base model, and the cache of its encodings; without a base, the student starts where
    `policy.previous` says."""
    about = generator.describe()
    network = family_of(generator.pipe, about["call"])
    knobs, size = config.policy, (generator.height, generator.width)
    previous = None
    if base is not None and base.adapter is not None and knobs.previous is None:
        raise UserError(
            f"these traces were made with adapter {base.adapter[:12]}: name its folder by "
            "--set policy.previous=DIR, or take the bare model's by --from adapter=none"
        )
    if base is not None and base.adapter is None and knobs.previous is not None:
        raise UserError("policy.previous is set, but these traces were made without an adapter")
    if knobs.previous is not None:
        previous = load_artifact(generator.pipe, knobs.previous, name=PREVIOUS, call=about["call"])
        if base is not None and previous.id != base.adapter:
            raise UserError(
                f"policy.previous {knobs.previous} is adapter {str(previous.id)[:12]}; "
                f"the traces were made with {str(base.adapter)[:12]}"
            )
    if previous is not None and previous.emotion_tokens is not None:
        tokens = copy.deepcopy(previous.emotion_tokens)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            tokens = EmotionConditioner.for_embeds(
                network.encode(None), tokens=knobs.extra_tokens, rank=knobs.emotion_rank,
                hidden=knobs.emotion_hidden,
                choices=config.data.phrases if knobs.emotion_choices is None else knobs.emotion_choices,
            )  # fmt: skip
    visual = None
    if previous is not None and previous.visual_prompts is not None:
        visual = copy.deepcopy(previous.visual_prompts)
    elif knobs.visual_bank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            visual = VisualConditioner.of_bank(
                Bank.load(Path(knobs.visual_bank)), network, knobs.visual_tokens, knobs.visual_width
            )
    policy = Policy(
        network, tokens, rank=knobs.rank, alpha=knobs.alpha, targets=knobs.targets, dropout=knobs.dropout,
        seed=config.train.seed, steps=generator.steps,
        guidance=generator.guidance if knobs.guidance is None else knobs.guidance,
        size=size, negative_prompt=about["negative_prompt"], previous=previous, visual=visual,
    )  # fmt: skip
    if knobs.gradient_checkpointing:
        network.module.enable_gradient_checkpointing()
    folder = Path(config.train.cache) if config.train.cache else settings.home / "cache"
    identity = {key: about[key] for key in ("model", "revision", "pipeline")}
    return policy, Cache(folder, network, identity, size, store.blobs.get_image)


def load_base(
    settings: Settings, config: DistillConfig, base: Base, device: torch.device
) -> DiffusersGenerator:
    """The bare base model on the device that trains.

    Raises:
        UserError: It cannot be trained here, or is of another revision than made the traces.
    """
    name = config.model or base.model
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[config.train.precision]
    if device.type == "cpu":
        # Autocast does the rest; half-precision weights on a CPU save memory that nobody lacks there.
        dtype = "float32"
    wanted = settings.generator.model_copy(
        update={"adapter": None, "device": str(device), "dtype": dtype, "base_url": None}
    )
    generator = load_generator(name, wanted)
    if not isinstance(generator, DiffusersGenerator):
        raise UserError(f"{name!r} is no diffusers pipeline in this process: it cannot be trained")
    revision = generator.describe()["revision"]
    if base.revision is not None and revision is not None and revision != base.revision:
        raise UserError(
            f"the traces were made by {base.model} at revision {base.revision[:12]}; "
            f"{name} is at {revision[:12]}: load the same weights, or collect again"
        )
    return generator


def _guards(config: DistillConfig, policy: Policy, cache: Cache, dataset: Dataset) -> Guards | None:
    for source in ("phrases", "pairs", "bests") if config.guard.every else ():
        if len(held_out := dataset.examples(source, "held_out")):
            shown = held_out.fetch(range(min(len(held_out), 256)))
            # What will be asked of the adapter is a person's target, not what a prompt happened to hit.
            asked = [replace(it, target=it.wanted or it.target) for it in shown]
            return Guards(config.guard, policy, cache, asked)
    return None


def _notes(config: DistillConfig, held_out: int, prompts: int, guarded: bool) -> list[str]:
    notes = []
    if config.objective["name"] == "nft" and config.data.group != "first":
        notes.append("nft on groups beyond round 0 is off-policy: other prompts made those images")
    if config.guard.every and not held_out:
        lost = "no held-out loss" if guarded else "no held-out loss, no guard, no sample sheet"
        notes.append(
            f"none of the {prompts} neutral prompts is held out (data.held_out={config.data.held_out}): {lost}; "
            "raise data.held_out or collect more prompts"
        )
    return notes


def _record(
    config: DistillConfig, objective: Objective, origin: Origin, outcome: Outcome, notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    """What `training.json` says."""
    figures = {"steps": float(outcome.steps), "train_minutes": outcome.seconds / 60, "loss": outcome.loss}
    figures |= {f"guard_{name}": value for name, value in outcome.last_look.items()}
    return {
        "objective": {"name": config.objective["name"], **objective.model_dump(mode="json")},
        "config": config.model_dump(mode="json"),
        # The generator is the bare model: only the log knows the adapter of the round before.
        "base": {**origin.about, "adapter": origin.base.adapter},
        "reward": {"name": origin.reward[0], "version": origin.reward[1]},
        # An evaluation refuses these as its headline judge.
        "critics": sorted({*origin.critics, *objective.judges}),
        "source": origin.source,
        "data": origin.data,
        "outcome": asdict(outcome),
        # None leaves it to the model; see `tools.adapter.Adapter.guidance`.
        "guidance": config.policy.guidance,
        "notes": notes,
        "figures": figures,
        "versions": versions("emoloop", "torch", "diffusers", "transformers", "peft", "accelerate"),
    }
