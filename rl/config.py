"""The knobs of a distillation, each explained in a line, and where their values come from.

A preset (`presets/*.yaml`), then a file (`--config`), then `--set key=value`; the resolved whole is written
into the run's folder. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..domain import UserError
from ..settings import merged, read_set, read_yaml
from ..tools.presets import GENERATORS, pipeline_of
from .objectives import load_objective

PRESETS = Path(__file__).parent / "presets"


Kind = Literal["rounds", "within", "across", "human"]
Beta = Annotated[float, Field(ge=0, lt=1)]
KINDS: tuple[Kind, ...] = get_args(Kind)


C = TypeVar("C", bound=BaseModel)


class Section(BaseModel):
    """Knobs that belong together."""

    # An infinite or undefined knob passes most bounds and turns up as a loss that is no number.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Section):
    """Which runs and how they become examples."""

    refined: Literal["all", "best", "winner"] = "all"
    """Which rewritten prompts teach: "all" that gained, "best" the one of each run that gained most,
    "winner" the one of the best image (none where a lucky image of the neutral prompt won)."""
    told: Literal["wanted", "read"] = "wanted"
    """The target of a pair: "wanted" is the run's, "read" what the critic read in the rewritten round, in
    the mean (hindsight, Andrychowicz et al. 2017, arXiv 1707.01495): a prompt that missed its target
    teaches exactly what it hit, so that the student need not average over misses. The gain is then
    counted towards that target."""
    phrases: int = Field(default=0, ge=0)
    """Above 0, `pairs` make way for `phrases`: so many additions, chosen to reach every target between
    them, that are told behind every neutral prompt (`rl/data/phrasebook.py`). One neutral prompt and target
    then has one answer, the one that a reader of the log's wording expects nearest; a student that is shown
    many learns their average. More phrases serve each prompt better and are harder to learn."""
    phrase_targets: int = Field(default=32, ge=1)
    """Targets that each neutral prompt is told with them: its own, and others of the log; 20,000 in all
    and at most."""
    min_gain: float = 0.0
    """Pairs need more gain than this."""
    max_spread: float | None = Field(default=None, gt=0)
    """Leave out candidates on which critics (or one critic's samples) differ by more points of valence or
    arousal; None keeps all."""
    gate: Literal["unselected", "all"] = "unselected"
    """"unselected" measures the gain without the image that won, "all" with it (biased upwards)."""
    min_margin: float = Field(default=0.1, ge=0)
    """Preference pairs need at least this difference of reward."""
    kinds: tuple[Kind, ...] = KINDS
    """Which preference pairs: "rounds" (the best image against the neutral prompt's worst in round 0), "within"
    (best against worst of those), "across" (two runs of one prompt with different targets), "human" (rated by a
    person; takes the place of a run's other pairs)."""
    group: Literal["first", "all"] = "first"
    """What forms a group: "first", the neutral prompt's images in round 0, is on-policy for what made the traces,
    "all" is not."""
    min_group: int = Field(default=2, ge=2)
    """Groups need this many rewards."""
    held_out: float = Field(default=0.15, ge=0, lt=1)
    """Share of neutral prompts kept from training for guards and held-out loss."""
    split_salt: str = "emoloop"
    """Another salt gives another split."""


class PolicyConfig(Section):
    """What is trained."""

    rank: int = Field(default=16, ge=1)
    """Rank of the LoRA; a previous adapter brings its own."""
    alpha: float = Field(default=16, gt=0)
    """Its alpha: the update is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Name endings of the layers to adapt; None takes the family's attention projections."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the LoRA."""
    emotion_rank: int = Field(default=32, ge=0)
    """Width of the emotion residual on the prompt's embeddings; 0 has none, and the target reaches the denoiser
    by the pooled embeddings, its modulation, alone."""
    emotion_choices: int | None = Field(default=None, ge=0)
    """Vectors that new emotion tokens choose among; None takes one for each of `data.phrases` and tells them which
    phrase it is, 0 has no choice, for phrases too many to tell apart. Those of a previous adapter keep theirs."""
    emotion_hidden: int = Field(default=128, ge=1)
    """Width of the network that reads valence, arousal and a little of the prompt."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance that the adapter is made for: of the student's own sampling in training, and what `emoloop
    run --adapter` takes where nothing else is said. None takes the model's."""
    extra_tokens: int = Field(default=0, ge=0)
    """Tokens appended to the prompt besides; above 0 training starts near the base, not at it."""
    visual_bank: str | None = None
    """A bank of visual prompts (`emoloop bank build`, its texts encoded by the generator): the student then
    learns to read them beside the text (`tools/diffusion/visual.py`). A previous adapter keeps its own."""
    visual_tokens: int = Field(default=4, ge=1)
    """Entries of the bank that are retrieved for a prompt."""
    visual_width: int = Field(default=128, ge=4)
    """Width of the tokens made of them, a multiple of 4."""
    previous: str | None = None
    """Artifact of the round before, where the traces were made with one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


class TrainConfig(Section):
    """How it is trained."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples in one forward pass of one process."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes in one optimizer step."""
    lr: float = Field(default=3e-4, ge=0)
    """Learning rate of the LoRA (AdamW); 0 leaves it out, and what else learns is trained alone."""
    emotion_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the emotion tokens; None takes `lr`, 0 leaves them as the start on text made them."""
    visual_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the visual prompts; None takes `lr`."""
    text_steps: int = Field(default=0, ge=0)
    """Steps before the first one in which the emotion tokens alone learn to make the refined prompt's
    embeddings of the neutral prompt's (`rl/warm_start.py`): no pass of the network, some hundredths of a
    second each. The prompts are those of `data.phrases`, else the log's pairs, whatever the objective takes."""
    warmup: int = Field(default=10, ge=0)
    """Steps over which the rate rises."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What it does then: "constant", "cosine" or "linear" down to 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the average of the weights that is saved; 0 saves the weights themselves."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the forward passes; weights in training and optimizer stay in float32."""
    device: str = "auto"
    """"auto" is what accelerate finds."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of weights, noise and data order."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many stay."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of `metrics.jsonl`."""
    tensorboard: bool = True
    """Write TensorBoard files too."""
    cache: str | None = None
    """Folder of encoded text and images; None is `cache/` beside the log."""


class GuardConfig(Section):
    """What training watches on fixed held-out prompts; never a judge of the results."""

    model: str | None = None
    """Dotted path of a recogniser ("emoloop.miniature.judge:Guard"), or None for pixel measures alone."""
    every: int = Field(default=100, ge=0)
    """Steps between looks; 0 never looks."""
    prompts: int = Field(default=6, ge=1)
    """Held-out requests."""
    seeds: int = Field(default=4, ge=2)
    """Images for each."""
    steps: int | None = Field(default=None, ge=1)
    """Sampler steps; None takes the model's default."""
    tolerance: float = Field(default=0.3, gt=0, lt=1)
    """A guard has fallen when it is this share below its yardsticks, a grid when the base's is this share below it."""
    periods: tuple[Annotated[int, Field(ge=2)], ...] = (8, 12, 14, 16)
    """Pixels after which a grid would repeat: patches of generators and critics."""
    action: Literal["stop", "flag"] = "flag"
    """What to do when the reward rises while a guard has fallen: "stop" or "flag"."""
    patience: int = Field(default=0, ge=0)
    """Stop when the held-out loss has not improved for so many looks; 0 never does."""
    sheet_every: int = Field(default=200, ge=0)
    """Steps between sample sheets; 0 draws none."""


class DistillConfig(Section):
    """Everything about one distillation."""

    objective: dict[str, Any] = {"name": "opd"}
    """`name` (registry or dotted path) and the objective's own knobs."""
    model: str | None = None
    """Base model; None takes what the log says made the images."""
    data: DataConfig = DataConfig()
    """Which runs become which examples."""
    policy: PolicyConfig = PolicyConfig()
    """What is trained."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    guard: GuardConfig = GuardConfig()
    """What is watched."""


#: Keys that may differ when a run goes on: they change nothing about the weights up to that point.
RESUMABLE = {
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.tensorboard",
    "train.cache",
    "guard.sheet_every",
    "objective.patience",
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
        preset: Name of a file in `presets/`; keys under `objectives.NAME` hold for that objective alone, and
            `pipeline` names the class of the pipelines that it fits.
        file: YAML of the same shape.
        sets: "key.sub=value", the value as YAML.

    Raises:
        UserError: Unknown preset or key, unreadable file, or a value out of range.
    """
    values: dict[str, Any] = _read(preset_file(PRESETS, preset), objective) if preset else {}
    values.pop("pipeline", None)
    for more in (_read(file, objective) if file else {}, read_set(sets, DistillConfig)):
        values = merged(values, more)
    values = merged(values, {"objective": {"name": objective}})
    return checked(DistillConfig, values, "docs/distillation.md")


def preset_for(model: str, config: Path | None = None) -> str | None:
    """The preset for a model as the log names it: by a short name or hub id, else by the class of its pipeline.

    Args:
        model: The model.
        config: A file that gives the knobs where no preset fits.

    Raises:
        UserError: None fits, and there is no file either.
    """
    fits = {path.stem: read_yaml(path).get("pipeline") for path in sorted(PRESETS.glob("*.yaml"))}
    name = next((name for name, it in GENERATORS.items() if model in (name, str(it.model))), model)
    pipeline = pipeline_of(model)
    found = (
        name
        if name in fits
        else next((it for it, kind in fits.items() if pipeline and kind == pipeline), None)
    )
    if found is None and config is None:
        raise UserError(
            f"no preset fits {model}, which made the images: name one by --preset ({', '.join(fits)}) "
            "or give --config FILE"
        )
    return found


def commented(config: DistillConfig) -> str:
    """The whole configuration as YAML that `--config` takes, each knob under a comment that explains it."""
    knobs = dict(config.objective)
    objective = load_objective(knobs.pop("name"), knobs)
    lines = ["objective:", "  # Registry name or dotted path.", f"  name: {config.objective['name']}"]
    lines += [line for key in type(objective).model_fields for line in explained(objective, key, "  ")]
    for section in type(config).model_fields:
        lines += explained(config, section) if section != "objective" else []
    return "\n".join(lines) + "\n"


def explained(model: BaseModel, key: str, indent: str = "") -> list[str]:
    """A knob, or a section of them, as YAML under comments that explain it."""
    value, about = getattr(model, key), type(model).model_fields[key].description or ""
    if isinstance(value, BaseModel):
        inside = (explained(value, knob, "  ") for knob in type(value).model_fields)
        return [f"{key}:", *(line for lines in inside for line in lines)]
    plain = model.model_dump(mode="json", include={key})[key]
    text = textwrap.wrap(about, 100 - len(indent))
    return [*(f"{indent}# {line}" for line in text), f"{indent}{key}: {_scalar(plain)}"]


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


def changed(
    before: Mapping[str, Any], now: BaseModel, free: Collection[str] = RESUMABLE
) -> dict[str, tuple[Any, Any]]:
    """The knobs with another value than in an earlier training (then, now), but for those that are free to differ.

    A knob that was not there yet did what its default does.
    """
    then, after = flat(type(now)()) | flat(before), flat(now)
    keys = sorted((then.keys() | after.keys()) - set(free))
    return {key: (then.get(key), after.get(key)) for key in keys if then.get(key) != after.get(key)}


def preset_file(folder: Path, name: str) -> Path:
    """The file of a preset.

    Raises:
        UserError: There is none of this name.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(it.stem for it in folder.glob("*.yaml")))
        raise UserError(f"no preset {name!r}; there are {known}")
    return path


def _read(path: Path, objective: str) -> dict[str, Any]:
    content = read_yaml(path)
    special = content.pop("objectives", None) or {}
    return merged(content, special.get(objective) or {})


def checked(kind: type[C], values: dict[str, Any], page: str) -> C:
    """Knobs of a kind.

    Raises:
        UserError: The first thing that is wrong with them, in one line; an unknown one gets the nearest that there is.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] != "extra_forbidden":
            raise UserError(f"{where}: {first['msg']} (got {first.get('input')!r})") from error
        near = get_close_matches(where, flat(kind()), n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; see {page}"
        raise UserError(f"unknown key {where!r}{hint}") from error
