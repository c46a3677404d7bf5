"""Adapters: LoRA weights by path, and the distilled artifact (LoRA, emotion tokens, visual prompts in one folder).

diffusers only warns when a LoRA binds nothing or in part, and the run then "succeeds" with the base model.
So loading and saving prove the effect: every key matched, at least one module bound, the output differs from
the base, and equals it at scale 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...domain import HIGH, EmotionTarget, UserError, first_line
from ...files import replacing
from ..fingerprint import content_hash
from ..presets import read_json
from ..quiet import quiet
from .card import card
from .conditioners import Conditioner, EmotionConditioner, points
from .families import Conditioning, Family, family_of
from .layers import activate, bound, carriers, layers_of, remove, set_scale, strength, weights_hash
from .negative import NegativeBranch
from .visual import VISUAL, VisualBridge, VisualConditioner, VisualControl

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
TOKENS_FILE = "emotion_tokens.safetensors"
VISUAL_FILE = "visual_prompts.safetensors"
CARD_FILE = "README.md"
TRAINING_FILE = "training.json"
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: The attribute under which a pipeline keeps our adapters.
_KNOWN = "_emoloop_adapters"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that is bound to a pipeline.

    Attributes:
        path: Where it came from.
        name: Its name in the pipeline.
        sha256: Hash over LoRA, emotion tokens and visual prompts.
        scale: Its strength; at 0 nothing is bound.
        emotion_tokens: The artifact's emotion tokens; None for a LoRA alone.
        visual_prompts: The artifact's visual prompts; None where it has none.
        visual: How they are used.
        bridge: What hands them to the pipeline's denoiser; None where nothing is bound.
        branch: What lets it speak in the negative branch alone; None where it speaks in both, or nothing is bound.
        training: The artifact's `training.json`.
        part: "tokens" or "lora" where the other is silent.
    """

    path: Path
    name: str
    sha256: str
    scale: float = 1.0
    emotion_tokens: EmotionConditioner | None = None
    visual_prompts: VisualConditioner | None = None
    visual: VisualControl = VISUAL
    bridge: VisualBridge | None = None
    branch: NegativeBranch | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    part: str | None = None

    @property
    def id(self) -> str | None:
        """For the record: the hash, with part and scale where it is not all of it; None where nothing is bound."""
        if self.scale == 0:
            return None
        told = f"{self.sha256}:{self.part}" if self.part else self.sha256
        told = told if self.scale == 1 else f"{told}@{self.scale:g}"
        told = f"{told}[negative]" if self.branch else told
        return told if self.visual_prompts is None else f"{told}{self.visual}"

    @property
    def guidance(self) -> float | None:
        """The guidance that it was made for; None leaves the model's, as where nothing is bound."""
        wanted = self.training.get("guidance")
        return None if wanted is None or self.scale == 0 else float(wanted)

    def takes(self, target: EmotionTarget | None) -> bool:
        """Whether a target changes the conditioning."""
        return bool(self._conditioners) and self.scale != 0 and target is not None

    @property
    def _conditioners(self) -> list[tuple[Conditioner, float]]:
        """Those there are, each with its strength; visual prompts are looked up by unchanged embeddings, so first."""
        both = (self.visual_prompts, self.scale * self.visual.scale), (self.emotion_tokens, self.scale)
        return [(module, scale) for module, scale in both if module is not None and scale]

    @torch.no_grad()
    def condition(
        self, embeds: Conditioning, target: EmotionTarget | None, negative: bool = False
    ) -> Conditioning:
        """Encoded prompts (B, L, D) with the target added, each row by itself: its bits know no company.

        The negative branch gets no emotion but the same shape, and the visual prompt of `visual.negative`. Of an
        adapter that serves that branch, the positive one.
        """
        if self.branch is not None:
            embeds = dataclasses.replace(
                embeds, negative=embeds.prompt.new_full((len(embeds), 1), float(negative))
            )
            negative = not negative
        if not self.takes(target):
            return embeds
        rows = [embeds[[row]] for row in range(len(embeds))]
        for module, scale in self._conditioners:
            module.to(embeds.prompt.device)
            against = self.visual.negative if isinstance(module, VisualConditioner) else None
            if negative and against is None:
                rows = [module.null(row) for row in rows]
                continue
            inputs = {"target": points([against if negative else target], embeds.prompt.device)}
            rows = [module(row, inputs, scale) for row in rows]
        return Conditioning.cat(rows)


def load_artifact(
    pipe: Any,
    path: Path | str,
    *,
    scale: float = 1.0,
    part: Literal["tokens", "lora"] | None = None,
    name: str | None = None,
    call: dict[str, Any] | None = None,
    base: Mapping[str, str | None] | None = None,
    visual: VisualControl = VISUAL,
    negative: bool = False,
) -> Adapter:
    """Bind an adapter to a pipeline and prove that it works.

    Args:
        pipe: A pipeline of a supported class. Left as it was when this fails.
        path: A distilled artifact, a folder with a LoRA in diffusers' or PEFT's format, or a LoRA file.
        scale: Strength; 0 checks the adapter and binds nothing.
        part: Which part of a distilled artifact speaks; None is both.
        name: The adapter's name in the pipeline; None takes a free one.
        call: Extra arguments of the pipeline's call (`call` of `emoloop.json`).
        base: `model` and `revision` of the pipeline; an adapter that says it was made for others is warned of.
        visual: How the artifact's visual prompts are used, where it has some.
        negative: Whether it serves the negative branch of guidance alone (`negative.py`).

    Raises:
        UserError: Nothing there, not a LoRA, made for another model, without the part, `name` is taken, or a second
            adapter with visual prompts or for the negative branch.
    """
    if not math.isfinite(scale):
        raise UserError(f"adapter {path}: its scale is a number, not {scale}")
    path = Path(path).expanduser()
    family = family_of(pipe, call)
    taken = {taken for model in carriers(pipe).values() for taken in model.peft_config}
    if name in taken:
        raise UserError(f"adapter {path}: the pipeline has an adapter {name!r} already")
    names = chain(["emoloop"], (f"emoloop_{n}" for n in count(2)))
    name = name or next(it for it in names if it not in taken)
    if negative and any(getattr(it, "adapter", it).branch for it in known(pipe).values()):
        raise UserError(f"adapter {path}: the pipeline has one for the negative branch already")
    lora, parts = _files(path)
    every = list(parts.values())
    if part == "tokens" and TOKENS_FILE not in parts:
        raise UserError(f"adapter {path} has no emotion tokens ({TOKENS_FILE})")
    if part is not None:
        parts = {TOKENS_FILE: parts[TOKENS_FILE]} if part == "tokens" else {}
    tokens, prompts = (
        EmotionConditioner.load(parts[TOKENS_FILE]) if TOKENS_FILE in parts else None,
        VisualConditioner.load(parts[VISUAL_FILE]) if VISUAL_FILE in parts else None,
    )
    training = read_json(path / TRAINING_FILE)
    made, here = training.get("base") or {}, base or {}
    for module in filter(None, (tokens, prompts)):
        if not module.to(pipe._execution_device).fits(family.encode("")):
            other = f", {made['model']} ({made.get('pipeline')})," if made.get("model") else ""
            told = f"its {module.kind} are made for another model{other} than this {type(pipe).__name__}"
            raise UserError(f"adapter {path}: {told}")
    before = _probe(family)
    # Shapes alone do not tell a model from its relatives.
    if all(made.get(key) and here.get(key) not in (None, made[key]) for key in ("model", "revision")):
        logger.warning("adapter %s was made for %s, and is used on %s", path, made["model"], here["model"])
    active = pipe.get_active_adapters() if taken else []
    bridge = None
    try:
        with quiet():
            expected = _bind(family, lora, name)
        _check_bound(pipe, path, name, expected)
        activate(pipe, [*active, name])
        if prompts is not None:
            bridge = VisualBridge(family, prompts, visual.guidance)
        _check_effect(family, path, name, _alone(training, prompts, tokens), before)
    except Exception as error:
        if bridge is not None:
            bridge.remove()
        with contextlib.suppress(Exception):
            remove(pipe, name, active)
        if isinstance(error, UserError):
            raise
        told = f"adapter {path} does not fit this {type(pipe).__name__}: {first_line(error)}"
        raise UserError(told) from error
    config = lora.with_name(_PEFT_CONFIG) if lora.name == _PEFT_WEIGHTS else None
    hashed = content_hash([file for file in (lora, *every, config) if file is not None])
    if scale == 0 and bridge is not None:
        bridge.remove()
        bridge = None
    branch = NegativeBranch(family, name) if negative and scale else None
    adapter = Adapter(path, name, hashed, scale, tokens, prompts, visual, bridge, branch, training, part)
    if scale == 0:
        remove(pipe, name, active)
    else:
        set_scale(pipe, name, 0.0 if part == "tokens" else scale)
        pipe.__dict__.setdefault(_KNOWN, {})[name] = adapter
    return adapter


def rescale(pipe: Any, adapter: Adapter, scale: float) -> Adapter:
    """Give an adapter that is bound another strength; at 0 the output is the base model's.

    Returns:
        The adapter at that strength, in place of the one given.
    """
    set_scale(pipe, adapter.name, 0.0 if adapter.part == "tokens" else scale)
    changed = dataclasses.replace(adapter, scale=scale)
    pipe.__dict__[_KNOWN][adapter.name] = changed
    return changed


def fuse(pipe: Any, adapter: Adapter) -> None:
    """Add an adapter's LoRA to the weights at its strength, until it is unloaded; then its rounding stays in them."""
    for layer in layers_of(pipe, adapter.name):
        layer.merge(adapter_names=[adapter.name])


def unload(pipe: Any, adapter: Adapter) -> None:
    """Take an adapter off the pipeline again; the others stay as they are."""
    if known(pipe).pop(adapter.name, None) is None:
        return
    for layer in layers_of(pipe, adapter.name):
        if adapter.name in layer.merged_adapters:
            layer.unmerge()
    for hung in filter(None, (adapter.bridge, adapter.branch)):
        hung.remove()
    if not known(pipe):
        del pipe.__dict__[_KNOWN]
    remove(pipe, adapter.name, [it for it in pipe.get_active_adapters() if it != adapter.name])


def known(pipe: Any) -> dict[str, Any]:
    """Our adapters by name, kept on the pipeline, since several generators may share it."""
    return pipe.__dict__.get(_KNOWN, {})


def adapters_on(pipe: Any) -> str | None:
    """The adapters that are active on a pipeline, for the record; None where there are none.

    Ours go by their id, one that somebody else put there by its name and a hash of its weights.
    """
    if not carriers(pipe):
        return None
    ours, told = known(pipe), []
    for name in pipe.get_active_adapters():
        if name in ours:
            told.append(ours[name].id)
        elif strength(pipe, name):
            told.append(f"{name}:{weights_hash(pipe, name)}")
    return "+".join(filter(None, told)) or None


def save_artifact(
    directory: Path | str,
    pipe: Any,
    *,
    adapter_name: str = "default",
    emotion_tokens: EmotionConditioner | None = None,
    visual_prompts: VisualConditioner | None = None,
    training: dict[str, Any] | None = None,
    base_model: str = "",
    call: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a distilled artifact; an older one's files are replaced only when all of the new ones are whole.

    Args:
        directory: The artifact's folder.
        pipe: The pipeline whose denoiser carries the LoRA.
        adapter_name: The LoRA's name there; it must be active, at scale 1.
        emotion_tokens: Written beside it where given.
        visual_prompts: The same.
        training: What `training.json` says: configuration, data hash, rewards, guard metrics. Plain JSON.
        base_model: The base model's id, for the card.
        call: As for `load_artifact`.
        weights: The LoRA by diffusers' names, where the pipeline holds a share of it; its effect is then left to
            whoever loads it.

    Returns:
        The folder.

    Raises:
        UserError: The LoRA binds no module, or changes nothing.
        OSError: The disk does not take it; what was there before is intact.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    directory, family = Path(directory), family_of(pipe, call)
    config = getattr(family.module, "peft_config", {}).get(adapter_name)
    if config is None:
        raise UserError(
            f"no module of the {family.denoiser} carries the LoRA {adapter_name!r}: nothing to save"
        )
    if weights is None:
        _check_effect(family, directory, adapter_name, _alone(training or {}, visual_prompts, emotion_tokens))
        weights = bound(pipe, adapter_name)
    metadata = {
        f"{family.denoiser}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    parts = {TOKENS_FILE: emotion_tokens, VISUAL_FILE: visual_prompts}
    with contextlib.ExitStack() as stack:

        def beside(name: str) -> Path:
            return stack.enter_context(replacing(directory / name))

        # The file that the pipeline's save_lora_weights writes, but with one entry in its header: safetensors
        # puts several in random order, and the same weights must give the same bytes.
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()},
            beside(LORA_FILE),
            metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True)},
        )
        for file, module in parts.items():
            if module is not None:
                module.save(beside(file))
        text = json.dumps(training or {}, indent=2, sort_keys=True, default=str)
        beside(TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
        about = card(
            type(pipe).__name__,
            config,
            base_model,
            training or {},
            tokens=emotion_tokens,
            visual=visual_prompts,
        )
        beside(CARD_FILE).write_text(about, encoding="utf-8")
    for file, module in parts.items():
        if module is None:
            (directory / file).unlink(missing_ok=True)
    return directory


def _files(path: Path) -> tuple[Path, dict[str, Path]]:
    """The LoRA file and what there is beside it, by name."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"adapter {path}: a .safetensors file is wanted")
        return path, {}
    if not path.is_dir():
        raise UserError(
            f"no adapter at {path}: a folder or a .safetensors file is wanted "
            "(of a hub's repository: what huggingface_hub.snapshot_download returns)"
        )
    beside = {name: path / name for name in (TOKENS_FILE, VISUAL_FILE) if (path / name).is_file()}
    present = [file for file in sorted(path.glob("*.safetensors")) if file.name not in beside]
    named = [path / name for name in (LORA_FILE, _PEFT_WEIGHTS) if path / name in present]
    if not present:
        raise UserError(f"adapter {path} holds no LoRA ({LORA_FILE})")
    if not named and len(present) > 1:
        raise UserError(f"adapter {path} holds {len(present)} safetensors files: name one of them")
    return (named or present)[0], beside


def _bind(family: Family, lora: Path, name: str) -> set[str]:
    """Load the LoRA; returns the names of the tensors that it holds, as diffusers calls them."""
    try:
        state = load_file(lora)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {lora} is not a readable safetensors file: {error}") from error
    if not any("lora" in key for key in state):
        raise UserError(f"adapter {lora} holds no LoRA weights")
    pipe = family.pipe
    if lora.name == _PEFT_WEIGHTS and lora.with_name(_PEFT_CONFIG).is_file():
        from peft import LoraConfig

        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        config = LoraConfig.from_pretrained(str(lora.parent)).to_dict()
        family.module.load_lora_adapter(
            state, prefix=None, adapter_name=name, metadata=config, _pipeline=pipe
        )
        return {f"{family.denoiser}.{key}" for key in state}
    how = {"use_safetensors": True, "local_files_only": True}
    found = pipe.lora_state_dict(str(lora), **how)
    pipe.load_lora_weights(str(lora), adapter_name=name, **how)
    return {key for key in (found[0] if isinstance(found, tuple) else found) if not key.endswith(".alpha")}


def _check_bound(pipe: Any, path: Path, name: str, expected: set[str]) -> None:
    found, kind = set(bound(pipe, name)), type(pipe).__name__
    if not found:
        raise UserError(f"adapter {path} binds to no module of this {kind}: made for another model?")
    # Older formats name the same tensors otherwise; then their number has to do.
    same_names = all(".lora_A." in key or ".lora_B." in key for key in expected)
    lost = sorted(expected ^ found) if same_names else ["?"] * abs(len(expected) - len(found))
    if lost:
        raise UserError(
            f"adapter {path} does not fit this {kind}: {len(lost)} of {len(expected)} tensors "
            f"have no place, the first is {lost[0]}"
        )


def _alone(training: Mapping[str, Any], *parts: Conditioner | None) -> list[Conditioner]:
    """The conditioners of an artifact that was trained by them alone; any other LoRA has to do something itself."""
    silent = training.get("config", {}).get("train", {}).get("lr") == 0
    return [part for part in parts if part is not None and silent]


def _check_effect(
    family: Family, path: Path, name: str, alone: Sequence[Conditioner], base: Tensor | None = None
) -> None:
    """Compare the output at scale 1, at scale 0, and before the adapter came (None: not known)."""
    on = _probe(family, alone)
    set_scale(family.pipe, name, 0)
    off = _probe(family)
    set_scale(family.pipe, name, 1)
    base = off if base is None else base
    if torch.equal(on, base):
        raise UserError(f"adapter {path} changes nothing: the output with it equals the base model's")
    if not torch.allclose(off, base, rtol=1e-3, atol=1e-3 * float(base.std()), equal_nan=True):
        raise UserError(f"adapter {path} changes the model even at scale 0: it is more than a LoRA")


@torch.no_grad()
def _probe(family: Family, alone: Sequence[Conditioner] = ()) -> Tensor:
    """The denoiser's prediction at a small size for a fixed prompt and noise: it sees all that carries a LoRA.

    Conditioners that speak alone are told the strongest wish.
    """
    modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module) and m.training]
    for module in modules:
        module.eval()
    try:
        size = min(8 * family.multiple, family.largest_size or 8 * family.multiple)
        shape = family.latent_shape(size, size)
        t = family.process().schedule(2, family.image_tokens(shape))[:1]
        condition = family.encode("a house by the sea")
        for module in alone:
            condition = module(
                condition, {"target": torch.full((1, 2), HIGH, device=condition.prompt.device)}
            )
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(condition.prompt)
        return family.denoise(family.module, x, t.to(x.device), condition, 1.0).float().cpu()
    finally:
        for module in modules:
            module.train()
