"""From labelled pictures to a critic: what `emoloop train critic` and a Python program call.

    from emoloop.rl.critic.train import train_critic
    result = train_critic(load_critic_config("miniature"), Path("data"), Path("runs/critic"))
    result.folder   # a model: emoloop run --lvlm runs/critic

Three stages, each optional: see through the generator's defects (`match.py`), answers with the labels in place
(`sft.py`), GRPO (`trainer.py`). A guard reads held-out
pictures; the weights of its best look are the result. What only the training needs lies under `training/`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ...domain import Failure, UserError
from ...files import write_atomic
from ...tools.fingerprint import revision, versions
from ...tools.presets import read_json
from ...tools.quiet import quiet
from ..checkpoint import check_folder
from ..config import changed
from ..launch import listening
from .card import card, figures, read
from .config import CriticConfig
from .data import Sample, digest, divided
from .data import read as read_data
from .match import Matcher, chosen
from .policy import CriticPolicy
from .rewards import tasks
from .sft import Collate, SFTrainer, complete

#: (step over all stages, steps of all stages, figures); for progress bars.
Watcher = Callable[[int, int, dict[str, float]], None]

_CONFIG, _LOOKS, _WEIGHTS = "config.yaml", "looks.jsonl", "weights.safetensors"

#: Knobs that may differ when a training goes on.
RESUMABLE = {"train.checkpoint_every", "train.keep_checkpoints", "guard.samples"}


@dataclass
class Trained:
    """What a training left.

    Attributes:
        folder: The model.
        reason: "finished", "guard" or "interrupted".
        figures: Flat numbers for reports.
        flags: Looks at which the guard fell, as "sft step 100: mae 0.61".
        card: The calibration card of the held-out pictures.
    """

    folder: Path
    reason: str = "finished"
    figures: dict[str, float] = field(default_factory=dict[str, float])
    flags: list[str] = field(default_factory=list[str])
    card: dict[str, Any] = field(default_factory=dict[str, Any])


class Guard:
    """Reads the same held-out pictures every so often, and keeps the weights that read them best.

    Args:
        policy: The critic.
        samples: Held-out pictures.
        folder: `looks.jsonl` and the best weights go here.
    """

    def __init__(self, policy: CriticPolicy, samples: Sequence[Sample], folder: Path) -> None:
        self._policy, self._samples, self._folder = policy, samples, folder
        self.best = folder / "best.safetensors"
        file = folder / _LOOKS
        self.looks: list[dict[str, Any]] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )

    def forget(self, stage: str, step: int) -> None:
        """Drop the looks of a stage beyond a step: a training that goes on from there takes them again."""
        self.looks = [look for look in self.looks if look["stage"] != stage or look["step"] <= step]

    def look(self, stage: str, step: int) -> bool:
        """Read; whether training should go on."""
        if any(look["stage"] == stage and look["step"] == step for look in self.looks):
            return True
        knobs = self._policy.config.guard
        found = figures(read(self._policy, self._samples), self._samples)
        # Pictures with categories alone have no distance.
        error = found.get("mae", 1 - found.get("category_accuracy", 0.0))
        least = min((look["error"] for look in self.looks if not look["fallen"]), default=math.inf)
        fallen = [f"valid {found['valid']:.2f}"] if found["valid"] < knobs.valid else []
        # An error that is no number has risen too.
        fallen += [] if error <= least * (1 + knobs.tolerance) else [f"error {error:.3f} over {least:.3f}"]
        if not fallen and error < least:
            self._policy.save_weights(self.best)
        self.looks.append(
            {"stage": stage, "step": step, "error": error, "fallen": ", ".join(fallen), **found}
        )
        write_atomic(self._folder / _LOOKS, "".join(json.dumps(look) + "\n" for look in self.looks))
        last = self.looks[-knobs.patience :]
        bad = len(last) == knobs.patience and all(look["fallen"] for look in last)
        return not (bad and knobs.action == "stop")

    @property
    def flags(self) -> list[str]:
        """The looks that fell."""
        return [
            f"{look['stage']} step {look['step']}: {look['fallen']}" for look in self.looks if look["fallen"]
        ]


class _Watch(TrainerCallback):
    """Guard, clock, progress and the wish to stop, at the ends of transformers' steps."""

    def __init__(
        self, stage: str, before: int, total: int, guard: Guard, every: int, heard: list[int], watch: Watcher
    ):
        self._stage, self._before, self._total = stage, before, total
        self._guard, self._every, self._heard, self._watch = guard, every, heard, watch
        self.reason = "finished"
        self._clock = guard.best.with_name(f"{stage}.seconds")
        self._began = time.monotonic() - self.seconds

    @property
    def seconds(self) -> float:
        """Spent on the stage, over all resumptions, up to the last checkpoint."""
        return float(self._clock.read_text()) if self._clock.exists() else 0.0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_atomic(self._clock, f"{time.monotonic() - self._began:.1f}")

    on_train_end = on_save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if (step % self._every == 0 or step == state.max_steps) and not self._guard.look(self._stage, step):
            self.reason, control.should_training_stop = "guard", True
        if self._heard:
            self.reason, control.should_training_stop = "interrupted", True
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        values = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if not math.isfinite(values.get("grad_norm", 0.0)):
            raise Failure(
                f"the gradient became {values['grad_norm']} at {self._stage} step {state.global_step}: lower lr"
            )
        self._watch(self._before + state.global_step, self._total, values)


def train_critic(
    config: CriticConfig,
    data: Path,
    out: Path,
    *,
    test: Path | None = None,
    resume: bool = False,
    watch: Watcher = lambda step, steps, figures: None,
) -> Trained:
    """Train a critic and write it as a model folder.

    Args:
        config: Everything about the training.
        data: Labelled pictures.
        out: The model's folder.
        test: Labelled pictures (as `folder` reads them) that are read before and after, and by which nothing is chosen;
            None takes the held-out ones for the figures.
        resume: Go on from the newest checkpoint in `out` (or begin, where there is none).
        watch: Called after each step.

    Raises:
        UserError: Wrong input, before anything is trained.
        Failure: Training broke off; the last checkpoint is intact.
    """
    training = out / "training"
    rewards = tasks(config.rewards, config.threshold)
    check_folder(out, training / _CONFIG, resume, lambda then: changed(then, config, RESUMABLE))
    train, held_out = divided(
        read_data(data, config.data.layout, config.data.scale), config.data.held_out, config.data.split_salt
    )
    tested = read_data(test, "folder", None) if test else held_out
    about = {"pictures": len(train), "held_out": len(held_out), "data_hash": digest([*train, *held_out])}
    # How long the making of the data took, where their maker says so.
    about["minutes"] = read_json(data / "making.json").get("minutes", 0.0)
    about["lexicon_labels"] = sum(sample.origin == "lexicon" for sample in train)
    policy = CriticPolicy(config)
    training.mkdir(parents=True, exist_ok=True)
    begun = training / "data.json"
    if begun.exists() and json.loads(begun.read_text())["data_hash"] != about["data_hash"]:
        raise UserError(
            f"the data have changed since the training in {out} began: use those, or another --out"
        )
    write_atomic(training / _CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_atomic(begun, json.dumps(about, indent=2) + "\n")

    guard = Guard(policy, held_out[: config.guard.pictures], training)
    # Before anything is restored: what the training began with.
    before = training / "before.json"
    if not before.exists():
        guard.look("start", 0)
        write_atomic(before, json.dumps(_read_all(policy, held_out, tested), indent=2) + "\n")
    result = Trained(out)
    seconds, past = 0.0, 0
    with listening() as heard:
        for stage, make in (("match", _match), ("sft", _sft), ("grpo", _grpo)):
            steps: int = getattr(config, stage).steps
            if not steps or result.reason != "finished":
                continue
            folder, done = training / stage, training / stage / _WEIGHTS
            callback = _Watch(stage, past, config.steps, guard, config.guard.every, heard, watch)
            past += steps
            if not done.exists():
                with quiet():
                    trainer = make(policy, train, folder, callback, rewards)
                    trainer.remove_callback(PrinterCallback)
                    last = newest(folder)
                    guard.forget(stage, int(last.name.rpartition("-")[2]) if last else 0)
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
                result.reason = callback.reason
                if result.reason != "interrupted":
                    # The next stage goes on from the best look, not from the last step.
                    policy.load_weights(guard.best)
                    policy.save_weights(done)
                    for old in folder.glob("checkpoint-*"):
                        shutil.rmtree(old)
            else:
                policy.load_weights(done)
            seconds += callback.seconds
    if result.reason == "interrupted":
        return result
    policy.load_weights(guard.best)
    result.flags = guard.flags
    result.card = card(policy, held_out, config.guard.samples, config.grpo.temperature)
    then, now = json.loads(before.read_text()), _read_all(policy, held_out, tested)
    result.figures = {
        **{f"{name}_before": value for name, value in then.items()},
        **{f"{name}_after": value for name, value in now.items()},
        "minutes": seconds / 60 + about["minutes"],
    }
    _write(policy, out, config, about, guard, result)
    return result


def card_of(config: CriticConfig, data: Path) -> dict[str, Any]:
    """The calibration card of the configured model, as it is, on all pictures of `data`."""
    samples = read_data(data, config.data.layout, config.data.scale)
    return card(CriticPolicy(config), samples, config.guard.samples, config.grpo.temperature)


def _read_all(policy: CriticPolicy, held_out: Sequence[Sample], tested: Sequence[Sample]) -> dict[str, float]:
    found = figures(read(policy, held_out), held_out)
    other = found if tested is held_out else figures(read(policy, tested), tested)
    return {**other, **{f"held_out_{name}": value for name, value in found.items()}}


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; one that a killed process left half-written goes."""
    whole = []
    for place in sorted(folder.glob("checkpoint-*"), key=lambda it: int(it.name.rpartition("-")[2])):
        try:
            # transformers writes it last.
            json.loads((place / "trainer_state.json").read_text())
            whole.append(place)
        except (OSError, ValueError):
            shutil.rmtree(place)
    return whole[-1] if whole else None


def _arguments(config: CriticConfig, folder: Path, steps: int, lr: float) -> dict[str, Any]:
    knobs = config.train
    return {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": lr, "lr_scheduler_type": "cosine",
        "warmup_steps": min(knobs.warmup, steps // 2), "weight_decay": knobs.weight_decay,
        "max_grad_norm": knobs.max_grad_norm, "bf16": knobs.precision == "bf16", "use_cpu": knobs.device == "cpu",
        "gradient_checkpointing": knobs.gradient_checkpointing, "seed": knobs.seed, "data_seed": knobs.seed,
        "logging_steps": 1, "logging_nan_inf_filter": False, "report_to": "none", "disable_tqdm": True,
        "save_steps": knobs.checkpoint_every, "save_total_limit": knobs.keep_checkpoints,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip


def _match(policy: CriticPolicy, train: Sequence[Sample], folder: Path, callback: Any, rewards: Any) -> Any:
    knobs = policy.config.match
    arguments = TrainingArguments(
        **_arguments(policy.config, folder, knobs.steps, knobs.lr),
        per_device_train_batch_size=knobs.batch_size,
    )
    pictures: Any = chosen(train)
    return Matcher(policy, args=arguments, train_dataset=pictures, callbacks=[callback])


def _sft(policy: CriticPolicy, train: Sequence[Sample], folder: Path, callback: Any, rewards: Any) -> Any:
    knobs = policy.config.sft
    arguments = TrainingArguments(
        **_arguments(policy.config, folder, knobs.steps, knobs.lr),
        per_device_train_batch_size=knobs.batch_size,
    )
    pairs: Any = complete(policy, train)
    return SFTrainer(
        policy, knobs.score_weight, args=arguments, train_dataset=pairs, data_collator=Collate(policy),
        callbacks=[callback],
    )  # fmt: skip


def _grpo(policy: CriticPolicy, train: Sequence[Sample], folder: Path, callback: Any, rewards: Any) -> Any:
    try:
        from trl import GRPOConfig

        from .trainer import TOLERANCE, CriticTrainer, as_dataset, as_rewards
    except ImportError as error:
        raise UserError(f"GRPO needs TRL and datasets ({error}): pip install 'emoloop[train]'") from error
    knobs = policy.config.grpo
    answers = knobs.group * knobs.questions
    micro = knobs.micro_batch or answers
    if answers % micro:
        raise UserError(f"grpo.micro_batch {micro} does not divide the {answers} answers of a step")
    try:
        arguments = GRPOConfig(
            **_arguments(policy.config, folder, knobs.steps, knobs.lr), per_device_train_batch_size=micro,
            gradient_accumulation_steps=answers // micro, num_generations=knobs.group,
            max_completion_length=policy.max_tokens, temperature=knobs.temperature, beta=knobs.beta, top_k=0,
            scale_rewards=knobs.scale_rewards, reward_weights=[weight for _, weight, _ in rewards],
            disable_dropout=True, **knobs.trl,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"grpo: {error}") from error
    trainer = CriticTrainer(
        model=policy.model, args=arguments, processing_class=policy.processor, callbacks=[callback],
        reward_funcs=as_rewards(rewards, train), train_dataset=as_dataset(policy, train),
    )  # fmt: skip
    ratio = trainer.log_ratio(policy, train[:4])
    if not ratio <= TOLERANCE[policy.config.train.precision]:
        raise Failure(
            f"before the first step, trainer and sampler differ by {ratio:.3g} in log-probability: the pictures or "
            "prompts of one are not the other's"
        )
    return trainer


def _write(
    policy: CriticPolicy,
    out: Path,
    config: CriticConfig,
    about: dict[str, Any],
    guard: Guard,
    result: Trained,
) -> None:
    record = {
        "kind": "critic",
        "base": {
            "model": str(config.model),
            "revision": revision(policy.base) if isinstance(policy.base, Path) else None,
        },
        "prompt": policy.prompt.id,
        "config": config.model_dump(mode="json"),
        "data": about,
        "reason": result.reason,
        "flags": result.flags,
        "looks": guard.looks,
        "card": result.card,
        "figures": result.figures,
        "versions": versions("emoloop", "torch", "transformers", "trl", "peft", "datasets"),
    }
    with quiet():
        policy.save(out)
    template = jinja2.Template(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    write_atomic(out / "README.md", template.render(record) + "\n")
    write_atomic(out / "training.json", json.dumps(record, indent=1) + "\n")
