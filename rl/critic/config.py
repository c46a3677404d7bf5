"""The knobs of the critic's training, each explained in a line; resolved as `rl/config.py` says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...settings import merged, read_set, read_yaml
from ..config import Section, checked, explained, preset_file

PRESETS = Path(__file__).parent / "presets"


class DataConfig(Section):
    """Which pictures, and how their labels are read."""

    layout: str = "folder"
    """How the data lie there: "folder", a published layout ("emoset", "emotic", "oasis", "emoscene"), or the dotted
    path of a reader."""
    scale: tuple[float, float] | None = None
    """Ends of the labels' scale, mapped to [-3, 3]; None takes the layout's own ("folder": [-3, 3])."""
    size: int = Field(default=448, ge=8)
    """Side of the pictures in pixels: one for all."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share held out for the guard and the card, where the data do not say which."""
    split_salt: str = "emoloop"
    """Another salt gives another split."""


class PolicyConfig(Section):
    """What is trained."""

    parts: Literal["vision", "lora", "full"] = "lora"
    """"vision": the vision tower and its connector, so that everything said without a picture stays as it is; "lora":
    an adapter on all linear layers, merged at the end; "full": all weights."""
    rank: int = Field(default=64, ge=1)
    """Rank of the LoRA."""
    alpha: float = Field(default=128, gt=0)
    """Its alpha."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the LoRA, in the supervised start; GRPO has none."""
    prompt: str | None = None
    """The critic's prompt file; None takes what the model says in its `emoloop.json`, else "critic"."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; None takes the model's."""


class MatchConfig(Section):
    """The first start: vision learns to see through the generator's defects, on pictures with a clean counterpart."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    batch_size: int = Field(default=48, ge=1)
    """Pictures in one step."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate; a cosine down to 0."""


class SFTConfig(Section):
    """The supervised start: answers with the labels in place. What the data do not say, the model says itself."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    batch_size: int = Field(default=16, ge=1)
    """Answers in one step."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate; a cosine down to 0."""
    score_weight: float = Field(default=1.0, gt=0)
    """Weight of a character of a number against any other token: syntax is learned at once, numbers are hard."""


class GRPOConfig(Section):
    """Group relative policy optimisation, as TRL does it."""

    steps: int = Field(default=500, ge=0)
    """Optimizer steps; 0 leaves it out."""
    group: int = Field(default=16, ge=2)
    """Answers to one question."""
    questions: int = Field(default=1, ge=1)
    """Questions in one step."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Answers in one forward pass; None takes all of a step."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate; a cosine down to 0."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled answers: hotter where a group's answers are all the same."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the weights that training began with."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the deviation of their group (the paper's), of the batch, or nothing. A group of
    near-equal answers becomes noise of full size under "group"."""
    trl: dict[str, Any] = Field(default={})
    """Further arguments of TRL's `GRPOConfig`, handed through: `{use_vllm: true, vllm_mode: colocate}` samples by
    vLLM."""


class TrainConfig(Section):
    """How both stages run."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    warmup: int = Field(default=10, ge=0)
    """Steps over which a stage's rate rises."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" is what accelerate finds."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of sampling, data order and new weights."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many stay."""


class GuardConfig(Section):
    """What is watched on held-out pictures; the best look's weights are what is kept."""

    every: int = Field(default=50, ge=1)
    """Steps between looks."""
    pictures: int = Field(default=128, ge=1)
    """Held-out pictures of a look."""
    tolerance: float = Field(default=0.1, gt=0)
    """The error has risen when it is this share above the best one."""
    valid: float = Field(default=0.98, ge=0, le=1)
    """Answers that can be read have become too few below this share."""
    patience: int = Field(default=3, ge=1)
    """Looks in a row that must fail before training stops."""
    action: Literal["stop", "flag"] = "stop"
    """What to do then."""
    samples: int = Field(default=8, ge=2)
    """Sampled answers for a picture, from which the card takes the spread."""


class CriticConfig(Section):
    """Everything about one training of a critic."""

    model: str = "miniature"
    """An LVLM: a preset, a folder or a hub id."""
    rewards: dict[str, float] = Field(
        default={"format": 1.0, "valence": 1.0, "arousal": 1.0, "category": 0.5, "description": 0.5}
    )
    """Tasks and their weights: "format", "valence", "arousal" (dense), "valence_within", "arousal_within" (1 within the
    threshold), "category", "description" (words of the analysis), or the dotted path of a reward."""
    threshold: float = Field(default=0.53, gt=0)
    """Of the `_within` tasks, in points; Q-Insight's .35 on a scale of 4 points, on ours of 6."""
    data: DataConfig = DataConfig()
    """Which pictures."""
    policy: PolicyConfig = PolicyConfig()
    """What is trained."""
    match: MatchConfig = MatchConfig()
    """The first start."""
    sft: SFTConfig = SFTConfig()
    """The supervised start."""
    grpo: GRPOConfig = GRPOConfig()
    """Reinforcement."""
    train: TrainConfig = TrainConfig()
    """How both run."""
    guard: GuardConfig = GuardConfig()
    """What is watched."""

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.match.steps + self.sft.steps + self.grpo.steps


def load_critic_config(
    preset: str | None = None, file: Path | None = None, sets: Iterable[str] = ()
) -> CriticConfig:
    """Resolve a configuration: a preset, a YAML file over it, KEY=VALUE words over both.

    Raises:
        UserError: Unknown preset or key, unreadable file, or a value out of range.
    """
    values: dict[str, Any] = read_yaml(preset_file(PRESETS, preset)) if preset else {}
    for more in (read_yaml(file) if file else {}, read_set(sets, CriticConfig)):
        # Tasks are a list, not knobs with defaults: who names some names all.
        values = merged({**values, "rewards": {}} if "rewards" in more else values, more)
    return checked(CriticConfig, values, "docs/critic.md")


def commented(config: CriticConfig) -> str:
    """The whole configuration as YAML that `--config` takes, each knob under a comment that explains it."""
    return "\n".join(line for key in type(config).model_fields for line in explained(config, key)) + "\n"
