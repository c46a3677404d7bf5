"""The knobs of a distillation, each explained in a line, and where their values come from.

A preset (`presets/*.yaml`), then a file (`--config`), then `--set key=value`; the resolved whole is written
into the run's folder. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..domain import UserError
from ..settings import merged, read_set
from .data.dataset import DataConfig

PRESETS = Path(__file__).parent / "presets"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyConfig(_Section):
    """What is trained.

    Attributes:
        rank: Rank of the LoRA; a previous adapter brings its own.
        alpha: Its alpha: the update is scaled by alpha / rank.
        targets: Name endings of the layers to adapt; None takes the family's attention projections.
        dropout: Dropout in front of the LoRA.
        emotion_rank: Width of the emotion residual on the prompt's embeddings.
        emotion_hidden: Width of the network that reads valence, arousal and a little of the prompt.
        guidance: Guidance that the adapter is made for: of the student's own sampling in training, and what
            `emoloop run --adapter` takes where nothing else is said. None takes the model's.
        extra_tokens: Tokens appended to the prompt besides; above 0 training starts near the base, not at it.
        previous: Artifact of the round before, where the traces were made with one.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16, gt=0)
    targets: tuple[str, ...] | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    emotion_rank: int = Field(default=32, ge=1)
    emotion_hidden: int = Field(default=128, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    extra_tokens: int = Field(default=0, ge=0)
    previous: str | None = None
    gradient_checkpointing: bool = False


class TrainConfig(_Section):
    """How it is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples in one forward pass of one process.
        accumulation: Forward passes in one optimizer step.
        lr: Learning rate of the LoRA (AdamW).
        emotion_lr: Learning rate of the emotion tokens; None takes `lr`.
        text_steps: Steps before the first one in which the emotion tokens alone learn to make the refined prompt's
            embeddings of the neutral prompt's (`rl/warm_start.py`): no pass of the network, some hundredths of a second
            each. For objectives with refined prompts.
        warmup: Steps over which the rate rises.
        schedule: What it does then: "constant", "cosine" or "linear" down to 0.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        ema: Decay of the average of the weights that is saved; 0 saves the weights themselves.
        precision: Of the forward passes; weights in training and optimizer stay in float32.
        device: "auto" is what accelerate finds.
        seed: Of weights, noise and data order.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many stay.
        log_every: Steps between lines of `metrics.jsonl`.
        tensorboard: Write TensorBoard files too.
        cache: Folder of encoded text and images; None is `cache/` beside the log.
    """

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    emotion_lr: float | None = Field(default=None, gt=0)
    text_steps: int = Field(default=0, ge=0)
    warmup: int = Field(default=10, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: str = "auto"
    seed: int = 0
    checkpoint_every: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=1, ge=1)
    tensorboard: bool = True
    cache: str | None = None


class GuardConfig(_Section):
    """What training watches on fixed held-out prompts; never a judge of the results.

    Attributes:
        model: Dotted path of a recogniser ("emoloop.miniature.judge:Guard"), or None for pixel measures alone.
        every: Steps between looks; 0 never looks.
        prompts: Held-out requests.
        seeds: Images for each.
        steps: Sampler steps; None takes the model's default.
        tolerance: A guard has fallen when it is this share below the lower of base and teacher.
        action: What to do when the reward rises while a guard has fallen: "stop" or "flag".
        patience: Stop when the held-out loss has not improved for so many looks; 0 never does.
        sheet_every: Steps between sample sheets; 0 draws none.
    """

    model: str | None = None
    every: int = Field(default=100, ge=0)
    prompts: int = Field(default=6, ge=1)
    seeds: int = Field(default=4, ge=2)
    steps: int | None = Field(default=None, ge=1)
    tolerance: float = Field(default=0.3, gt=0, lt=1)
    action: Literal["stop", "flag"] = "flag"
    patience: int = Field(default=0, ge=0)
    sheet_every: int = Field(default=200, ge=0)


class DistillConfig(_Section):
    """Everything about one distillation.

    Attributes:
        objective: `name` (registry or dotted path) and the objective's own knobs.
        model: Base model; None takes what the log says made the images.
        data: Which runs become which examples.
        policy: What is trained.
        train: How it is trained.
        guard: What is watched.
    """

    objective: dict[str, Any] = {"name": "opd"}
    model: str | None = None
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    guard: GuardConfig = GuardConfig()


#: Keys that may differ when a run goes on: they change nothing about the weights up to that point.
RESUMABLE = {
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.tensorboard",
    "train.cache",
    "guard.sheet_every",
}


def load_config(
    objective: str,
    preset: str | None = None,
    file: Path | None = None,
    sets: Iterable[str] = (),
) -> DistillConfig:
    """Resolve a configuration.

    Args:
        objective: Name or dotted path.
        preset: Name of a file in `presets/`; keys under `objectives.NAME` hold for that objective alone.
        file: YAML of the same shape.
        sets: "key.sub=value", the value as YAML.

    Raises:
        UserError: Unknown preset or key, unreadable file, or a value out of range.
    """
    values: dict[str, Any] = {}
    for source in (_preset_path(preset) if preset else None, file):
        if source is not None:
            values = merged(values, _read(source, objective))
    values = merged(values, read_set(sets, DistillConfig))
    values = merged(values, {"objective": {"name": objective}})
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def commented(config: DistillConfig) -> str:
    """The whole configuration as YAML that `--config` takes, each knob under a comment that explains it."""
    from .objectives import load_objective

    knobs = dict(config.objective)
    name = knobs.pop("name")
    objective = load_objective(name, knobs)
    lines = ["objective:", f"  # Registry name or dotted path.\n  name: {name}"]
    lines += _explained(objective, "  ")
    for section, model in config:
        if section == "objective":
            continue
        if isinstance(model, BaseModel):
            lines += [f"{section}:", *_explained(model, "  ")]
        else:
            lines += [f"# {_attributes(type(config))[section]}", f"{section}: {_scalar(model)}"]
    return "\n".join(lines) + "\n"


def _explained(model: BaseModel, indent: str) -> list[str]:
    about = {key: text for cls in reversed(type(model).__mro__) for key, text in _attributes(cls).items()}
    lines = []
    for key, value in model.model_dump(mode="json").items():
        wrapped = textwrap.wrap(about.get(key, ""), 100 - len(indent))
        lines += [f"{indent}# {text}" for text in wrapped]
        lines.append(f"{indent}{key}: {_scalar(value)}")
    return lines


def _attributes(cls: type) -> dict[str, str]:
    """Name → explanation, from the "Attributes:" part of a class's docstring."""
    _, found, text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries = (
        re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", text.split("\n\n")[0], re.MULTILINE) if found else []
    )
    return {name: " ".join(words.split()) for name, words in entries}


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def flat(config: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as "section.key"."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _preset_path(name: str) -> Path:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(f"no preset {name!r}; there are {known}")
    return path


def _read(path: Path, objective: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: want sections such as train: and data:")
    special = content.pop("objectives", None) or {}
    return merged(content, special.get(objective) or {})


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']} (got {first.get('input')!r})"
    known = [key for key in flat(DistillConfig()) if key != "objective.name"]
    near = get_close_matches(where, known, n=1)
    return f"unknown key {where!r}" + (
        f", did you mean {near[0]!r}?" if near else "; see docs/distillation.md"
    )


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
