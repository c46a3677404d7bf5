"""Opening diffusers pipelines: from a preset, a folder or a hub id, on the wanted device and in the wanted dtype."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...domain import UserError, first_line
from ...settings import GeneratorSettings
from .. import presets
from ..diffusion.families import family_class
from ..fingerprint import revision
from ..quiet import quiet
from .diffusers import DiffusersGenerator


def open_model(settings: GeneratorSettings) -> DiffusersGenerator:
    """The generator that settings name.

    Raises:
        UserError: As `load_generator`.
    """
    found = presets.resolve(settings.model)
    folder = found if isinstance(found, Path) else _download(found)
    defaults = {**presets.defaults(settings.model), **presets.read_json(folder / presets.DEFAULTS_FILE)}
    device = device_of(settings.device)
    pipe = load_pipeline(folder, dtype_of(settings.dtype, device), defaults.get("load") or {}).to(device)
    return DiffusersGenerator(
        pipe, settings, model=settings.model, revision=revision(folder), defaults=defaults
    )


def load_pipeline(folder: Path, dtype: torch.dtype, load: dict[str, Any] | None = None) -> Any:
    """Load a diffusers folder, on the CPU and in eval mode.

    Components that `model_index.json` leaves out or sets to null are passed as None, which is what diffusers
    wants for an SD3 without T5. Components whose class is this package's own are imported first, since
    diffusers imports no module that it doesn't know.

    Args:
        folder: The model folder.
        dtype: Dtype of the weights.
        load: Extra arguments for `from_pretrained`.

    Raises:
        UserError: No folder, not a diffusers pipeline, an unsupported class, or files that do not load.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    components = presets.read_json(index)
    name, own = str(components.pop("_class_name", "")), __name__.partition(".")[0]
    family = family_class([name])
    try:
        with quiet():
            pipeline_class = getattr(import_module("diffusers"), family.pipeline)
            parts, _ = pipeline_class._get_signature_keys(pipeline_class)
            absent = {part: None for part in parts if (components.get(part) or [None])[0] is None}
            for value in components.values():
                if isinstance(value, list) and str(value[0]).partition(".")[0] == own:
                    import_module(value[0])
            return pipeline_class.from_pretrained(folder, dtype=dtype, **{**absent, **(load or {})})
    except Exception as error:
        raise UserError(f"{folder} does not load as a {name}: {first_line(error)}") from error


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id))
    except Exception as error:
        told = f"no folder {hub_id!r} here, and the model hub did not give it: {first_line(error)}"
        raise UserError(told) from error


def device_of(name: str) -> torch.device:
    """The device of a name, "auto" for the best there is.

    Raises:
        UserError: It is not here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not here: {first_line(error)}") from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, "auto" for what suits the device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
