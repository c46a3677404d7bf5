"""Adapters: LoRA weights by path, and the distilled artifact (LoRA and emotion tokens in one folder).

diffusers only warns when a LoRA binds nothing or in part, and the run then "succeeds" with the base model.
So loading and saving prove the effect: every key matched, at least one module bound, the output differs from
the base, and equals it at scale 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...domain import UserError
from ..fingerprint import content_hash
from ..quiet import quiet
from .conditioners import EmotionConditioner
from .families import Family, family_of

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
TOKENS_FILE = "emotion_tokens.safetensors"
CARD_FILE = "README.md"
TRAINING_FILE = "training.json"
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: What LoRA can bind to, beside the denoiser.
_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that is bound to a pipeline.

    Attributes:
        path: Where it came from.
        name: Its name in the pipeline.
        sha256: Hash over LoRA and emotion tokens.
        scale: Its strength; at 0 nothing is bound.
        emotion_tokens: The artifact's emotion tokens; None for a LoRA alone.
        training: The artifact's `training.json`.
    """

    path: Path
    name: str
    sha256: str
    scale: float = 1.0
    emotion_tokens: EmotionConditioner | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str | None:
        """For the record: the hash, with the scale where it is not 1; None where nothing is bound."""
        if self.scale == 0:
            return None
        return self.sha256 if self.scale == 1 else f"{self.sha256}@{self.scale:g}"

    @property
    def guidance(self) -> float | None:
        """The guidance that it was made for; None leaves the model's, as where nothing is bound."""
        wanted = self.training.get("guidance")
        return None if wanted is None or self.scale == 0 else float(wanted)


def load_artifact(
    pipe: Any,
    path: Path | str,
    *,
    scale: float = 1.0,
    name: str | None = None,
    call: dict[str, Any] | None = None,
    base: Mapping[str, str | None] | None = None,
) -> Adapter:
    """Bind an adapter to a pipeline and prove that it works.

    Args:
        pipe: A pipeline of a supported class. Left as it was when this fails.
        path: A distilled artifact, a folder with a LoRA in diffusers' or PEFT's format, or a LoRA file.
        scale: Strength; 0 checks the adapter and binds nothing.
        name: The adapter's name in the pipeline; None takes a free one.
        call: Extra arguments of the pipeline's call (`call` of `emoloop.json`).
        base: `model` and `revision` of the pipeline; an adapter that says it was made for others is warned of.

    Raises:
        UserError: Nothing there, not a LoRA, made for another model, or `name` is taken.
    """
    path = Path(path).expanduser()
    family = family_of(pipe, call)
    taken = {taken for model in _lora_models(pipe, None).values() for taken in model.peft_config}
    if name is None:
        free = (f"emoloop_{n}" for n in count(2))
        name = next(it for it in chain(["emoloop"], free) if it not in taken)
    if name in taken:
        raise UserError(f"adapter {path}: the pipeline has an adapter {name!r} already")
    lora, tokens = _files(path)
    module = EmotionConditioner.load(tokens) if tokens else None
    if module is not None and not module.fits(family.encode("")):
        raise UserError(f"adapter {path}: its emotion tokens are made for another model ({module.config})")
    before = _probe(family)
    training = _read_json(path / TRAINING_FILE) if path.is_dir() else {}
    _check_base(path, training, base or {})
    others = bool(_lora_models(pipe, None))
    active = list(pipe.get_active_adapters()) if others else []
    try:
        with quiet():
            expected = _bind(family, lora, name)
        _check_bound(pipe, path, name, expected)
        _activate(pipe, [*active, name])
        _check_effect(family, path, name, before)
    except Exception as error:
        with contextlib.suppress(Exception):
            _remove(pipe, name, others, active)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"adapter {path} does not fit this {type(pipe).__name__}: {_first_line(error)}"
        ) from error
    if scale == 0:
        _remove(pipe, name, others, active)
    else:
        _rescale(pipe, name, scale)
    hashed = [file for file in (lora, tokens) if file is not None]
    if lora.name == _PEFT_WEIGHTS:
        hashed.append(lora.with_name(_PEFT_CONFIG))
    if module is not None:
        module.to(family.module.device)
    adapter = Adapter(path, name, content_hash(hashed), scale, module, training)
    if scale != 0:
        _known(pipe)[name] = str(adapter.id)
    return adapter


def unload(pipe: Any, adapter: Adapter) -> None:
    """Take an adapter off the pipeline again; the others stay as they are."""
    if _known(pipe).pop(adapter.name, None) is not None:
        active = [name for name in pipe.get_active_adapters() if name != adapter.name]
        _remove(pipe, adapter.name, _others(pipe, adapter.name), active)


def adapters_on(pipe: Any) -> str | None:
    """The adapters that are active on a pipeline, for the record; None where there are none.

    Ours go by their id, one that somebody else put there by its name and a hash of its weights.
    """
    if not _lora_models(pipe, None):
        return None
    known, found = _known(pipe), []
    for name in pipe.get_active_adapters():
        found.append(known.get(name) or f"{name}:{_weights_hash(pipe, name)}")
    return "+".join(found) or None


def _known(pipe: Any) -> dict[str, str]:
    """Ids of our adapters by name, kept on the pipeline, since several generators may share it."""
    return pipe.__dict__.setdefault("_emoloop_adapters", {})


def _others(pipe: Any, name: str) -> bool:
    return any(set(model.peft_config) - {name} for model in _lora_models(pipe, None).values())


def _weights_hash(pipe: Any, name: str) -> str:
    from peft.utils import get_peft_model_state_dict

    digest = hashlib.sha256()
    for part, model in _lora_models(pipe, name).items():
        for key, value in sorted(get_peft_model_state_dict(model, adapter_name=name).items()):
            digest.update(f"{part}.{key}".encode() + value.detach().float().cpu().numpy().tobytes())
    digest.update(repr([layer.scaling[name] for layer in _layers(pipe, name)]).encode())
    return digest.hexdigest()


def _check_base(path: Path, training: dict[str, Any], base: Mapping[str, str | None]) -> None:
    """Warn of an adapter made for other weights: shapes alone do not tell a model from its relatives."""
    made = training.get("base")
    if not isinstance(made, dict):
        return
    pairs = [(made.get(key), base.get(key)) for key in ("model", "revision")]
    if all(one and other and one != other for one, other in pairs):
        (model, here), _ = pairs
        logger.warning("adapter %s was made for %s, and is used on %s", path, model, here)


def save_artifact(
    directory: Path | str,
    pipe: Any,
    *,
    adapter_name: str = "default",
    emotion_tokens: EmotionConditioner | None = None,
    training: dict[str, Any] | None = None,
    card: str | None = None,
    base_model: str = "",
    call: dict[str, Any] | None = None,
    check: bool = True,
) -> Path:
    """Write a distilled artifact; an older one at the same place is replaced only when the new one is whole.

    Args:
        directory: The artifact's folder.
        pipe: The pipeline whose denoiser carries the LoRA.
        adapter_name: The LoRA's name there; it must be active.
        emotion_tokens: Written beside it where given.
        training: What `training.json` says: configuration, data hash, rewards, guard metrics. Plain JSON.
        card: Body of the model card; None writes one.
        base_model: The base model's id, for the card.
        call: As for `load_artifact`.
        check: Prove the effect first; off for checkpoints of a training that has not begun to move.

    Returns:
        The folder.

    Raises:
        UserError: The LoRA binds no module, or changes nothing.
        OSError: The disk does not take it; what was there before is intact.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    directory = Path(directory)
    family = family_of(pipe, call)
    network = family.module
    config = getattr(network, "peft_config", {}).get(adapter_name)
    state = get_peft_model_state_dict(network, adapter_name=adapter_name) if config is not None else {}
    if config is None or not state:
        raise UserError(
            f"no module of the {family.denoiser} carries the LoRA {adapter_name!r}: nothing to save"
        )
    if check:
        with _rescaled(pipe, adapter_name, 0.0):
            base = _probe(family)
        _check_effect(family, directory, adapter_name, base)
    metadata = {
        f"{family.denoiser}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        # The file that the pipeline's save_lora_weights writes, but with one entry in its header: safetensors
        # puts several in random order, and the same weights must give the same bytes.
        save_file(
            {f"{family.denoiser}.{key}": value.detach().cpu().contiguous() for key, value in state.items()},
            partial / LORA_FILE,
            metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True)},
        )
        if emotion_tokens is not None:
            emotion_tokens.save(partial / TOKENS_FILE)
        text = json.dumps(training or {}, indent=2, sort_keys=True, default=str)
        (partial / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
        body = card if card is not None else _card_body(pipe, emotion_tokens, config)
        (partial / CARD_FILE).write_text(_card_head(base_model) + body, encoding="utf-8")
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _files(path: Path) -> tuple[Path, Path | None]:
    """The LoRA file and, where there are some, the emotion tokens beside it."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"adapter {path}: a .safetensors file is wanted")
        return path, None
    if not path.is_dir():
        raise UserError(f"no adapter at {path}")
    tokens = path / TOKENS_FILE
    found = [path / LORA_FILE, path / _PEFT_WEIGHTS]
    found += [file for file in sorted(path.glob("*.safetensors")) if file not in (tokens, *found)]
    present = [file for file in found if file.is_file()]
    if not present:
        raise UserError(f"adapter {path} holds no LoRA ({LORA_FILE})")
    if present[0] not in found[:2] and len(present) > 1:
        raise UserError(f"adapter {path} holds {len(present)} safetensors files: name one of them")
    return present[0], tokens if tokens.is_file() else None


def _bind(family: Family, lora: Path, name: str) -> set[str]:
    """Load the LoRA; returns the names of the tensors that it holds, as diffusers calls them."""
    if lora.name == _PEFT_WEIGHTS and lora.with_name(_PEFT_CONFIG).is_file():
        from peft import LoraConfig

        state = {k.removeprefix("base_model.model."): v for k, v in _tensors(lora).items()}
        known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
        config = _read_json(lora.with_name(_PEFT_CONFIG))
        config = {key: value for key, value in config.items() if key in known and key != "peft_type"}
        family.module.load_lora_adapter(state, prefix=None, adapter_name=name, metadata=config)
        return {f"{family.denoiser}.{key}" for key in state}
    _tensors(lora)
    pipe = family.pipe
    found = pipe.lora_state_dict(str(lora), use_safetensors=True, local_files_only=True)
    state = found[0] if isinstance(found, tuple) else found
    pipe.load_lora_weights(str(lora), adapter_name=name, use_safetensors=True, local_files_only=True)
    return {key for key in state if not key.endswith(".alpha")}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {path} is not a readable safetensors file: {error}") from error
    if not any("lora" in key for key in state):
        raise UserError(f"adapter {path} holds no LoRA weights")
    return state


def _lora_models(pipe: Any, name: str | None) -> dict[str, Any]:
    """Components that carry the adapter `name`, or any adapter."""
    found = {part: getattr(pipe, part, None) for part in ("transformer", "unet", *_ENCODERS)}
    configs = {part: getattr(model, "peft_config", {}) for part, model in found.items()}
    return {part: found[part] for part, c in configs.items() if (name in c if name else c)}


def _check_bound(pipe: Any, path: Path, name: str, expected: set[str]) -> None:
    from peft.utils import get_peft_model_state_dict

    bound = {
        f"{part}.{key}"
        for part, model in _lora_models(pipe, name).items()
        for key in get_peft_model_state_dict(model, adapter_name=name)
    }
    if not bound:
        raise UserError(
            f"adapter {path} binds to no module of this {type(pipe).__name__}: made for another model?"
        )
    # Older formats name the same tensors otherwise; then their number has to do.
    same_names = all(".lora_A." in key or ".lora_B." in key for key in expected)
    lost = sorted(expected ^ bound) if same_names else ["?"] * abs(len(expected) - len(bound))
    if lost:
        raise UserError(
            f"adapter {path} does not fit this {type(pipe).__name__}: {len(lost)} of {len(expected)} tensors "
            f"have no place, the first is {lost[0]}"
        )


def _check_effect(family: Family, path: Path, name: str, base: Tensor) -> None:
    if torch.equal(_probe(family), base):
        raise UserError(f"adapter {path} changes nothing: the output with it equals the base model's")
    with _rescaled(family.pipe, name, 0.0):
        off = _probe(family)
    if not torch.allclose(off, base, rtol=1e-3, atol=1e-3 * float(base.std()), equal_nan=True):
        raise UserError(f"adapter {path} changes the model even at scale 0: it is more than a LoRA")


@torch.no_grad()
def _probe(family: Family) -> Tensor:
    """Latents of two steps at a small size for a fixed prompt and seed: fast, and it sees every component."""
    pipe, size = family.pipe, 8 * family.multiple
    size = min(size, family.largest_size or size)
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    training = [m for m in modules if m.training]
    for module in training:
        module.eval()
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        output = pipe(
            **family.arguments(family.encode("a house by the sea"), None),
            height=size,
            width=size,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
            **family.call,
        )
    finally:
        pipe.set_progress_bar_config(**bar)
        for module in training:
            module.train()
    return output.images.float().cpu()


def _layers(pipe: Any, name: str) -> list[Any]:
    return [
        module
        for model in _lora_models(pipe, name).values()
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling
    ]


def _rescale(pipe: Any, name: str, factor: float) -> None:
    for layer in _layers(pipe, name):
        layer.scaling[name] *= factor


@contextmanager
def _rescaled(pipe: Any, name: str, factor: float) -> Iterator[None]:
    before = [(layer, layer.scaling[name]) for layer in _layers(pipe, name)]
    _rescale(pipe, name, factor)
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling[name] = scaling


def _activate(pipe: Any, names: list[str]) -> None:
    # Model by model, since the pipeline's own set_adapters would put the others' weights back to 1.
    for model in _lora_models(pipe, None).values():
        model.set_adapter([name for name in names if name in model.peft_config])


def _remove(pipe: Any, name: str, others: bool, active: list[str]) -> None:
    if others:
        pipe.delete_adapters(name)
        _activate(pipe, active)
    else:
        pipe.unload_lora_weights()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _replace(new: Path, old: Path) -> None:
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def _card_head(base_model: str) -> str:
    base = f"base_model: {base_model}\n" if base_model else ""
    return (
        f"---\n{base}library_name: diffusers\npipeline_tag: text-to-image\n"
        "tags: [lora, text-to-image, diffusers, emoloop]\n---\n\n"
    )


def _card_body(pipe: Any, emotion_tokens: EmotionConditioner | None, config: Any) -> str:
    if emotion_tokens is None:
        use = "The LoRA loads in plain diffusers:"
    else:
        use = (
            f"`{TOKENS_FILE}` carries the target (valence and arousal in [-3, 3]) into prompt embeddings; "
            "emoloop loads it with the LoRA:\n\n"
            "    emoloop run PROMPT --valence 2 --arousal -1 --adapter THIS_FOLDER\n\n"
            "The LoRA alone loads in plain diffusers, but it has no target then and draws what it learned on "
            "average:"
        )
    return (
        f"# Emotion adapter for {type(pipe).__name__}\n\n"
        "Distilled by emoloop from logged runs of its feedback loop: one pass on the plain prompt is to give "
        "what the loop reached by rewriting it.\n\n"
        f"{use}\n\n    pipe.load_lora_weights(THIS_FOLDER)\n\n"
        f"LoRA rank {config.r}, alpha {config.lora_alpha}. How it was trained, on which data and with which "
        f"guard metrics: `{TRAINING_FILE}`.\n"
    )
