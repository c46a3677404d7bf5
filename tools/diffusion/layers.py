"""The LoRA layers of a pipeline by the name of their adapter.

diffusers keeps adapters for each model, peft for each layer, and the pipeline's own switches change those of others
too: so everything here goes model by model, or layer by layer.
"""

from __future__ import annotations

import hashlib
from statistics import fmean
from typing import Any

from torch import Tensor


def carriers(pipe: Any, name: str | None = None) -> dict[str, Any]:
    """Components that carry the adapter `name`, or any adapter."""
    listed = pipe.get_list_adapters().items()
    return {part: getattr(pipe, part) for part, names in listed if (name in names if name else names)}


def bound(pipe: Any, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter that is on the pipeline, by diffusers' names."""
    from peft.utils import get_peft_model_state_dict

    return {
        f"{part}.{key}": value
        for part, model in carriers(pipe, name).items()
        for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
    }


def layers_of(pipe: Any, name: str) -> list[Any]:
    """The layers that carry an adapter."""
    return [
        module
        for model in carriers(pipe, name).values()
        for module in model.modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling
    ]


def set_scale(pipe: Any, name: str, scale: float) -> None:
    """Give an adapter a strength and leave the others theirs, which `pipe.set_adapters` would put back to 1."""
    for layer in layers_of(pipe, name):
        layer.set_scale(name, scale)


def activate(pipe: Any, names: list[str]) -> None:
    """Switch these on, and no others."""
    for model in carriers(pipe).values():
        model.set_adapter([name for name in names if name in model.peft_config])


def remove(pipe: Any, name: str, active: list[str]) -> None:
    """Take an adapter off and leave others, of which `active` are switched on."""
    if any(set(model.peft_config) - {name} for model in carriers(pipe).values()):
        pipe.delete_adapters(name)
        activate(pipe, active)
    else:
        pipe.unload_lora_weights()


def strength(pipe: Any, name: str) -> float:
    """An adapter's scale as diffusers has it now (the mean over layers); 0 where it is switched off or gone."""
    units = [
        layer.scaling[name]
        * (layer.r[name] ** (0.5 if layer.use_rslora[name] else 1))
        / layer.lora_alpha[name]
        for layer in layers_of(pipe, name)
        if name in layer.active_adapters and not layer.disable_adapters
    ]
    # Rounded, so that what was set to .7 is .7.
    return round(fmean(units), 6) if units else 0.0


def weights_hash(pipe: Any, name: str) -> str:
    """Hash of an adapter's tensors and strengths."""
    digest = hashlib.sha256()
    for key, value in sorted(bound(pipe, name).items()):
        digest.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
    digest.update(repr([layer.scaling[name] for layer in layers_of(pipe, name)]).encode())
    return digest.hexdigest()
