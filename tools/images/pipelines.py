"""Opening diffusers pipelines: from a preset, a folder or a hub id, on the wanted device and in the wanted dtype."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...domain import UserError
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
    pipe = load_pipeline(folder, _dtype(settings.dtype, device), defaults.get("load") or {}).to(device)
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
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    components = presets.read_json(index)
    name = str(components.pop("_class_name", ""))
    with quiet():
        pipeline_class = getattr(import_module("diffusers"), family_class([name]).pipeline)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    # What has another default (flags such as requires_safety_checker) is no component.
    absent = {
        key: None
        for key, parameter in parameters.items()
        if key != "self"
        and parameter.default in (None, inspect.Parameter.empty)
        and (components.get(key) or [None])[0] is None
    }
    own = __name__.partition(".")[0]
    for value in components.values():
        if isinstance(value, list) and value and str(value[0]).partition(".")[0] == own:
            _import_component(folder, str(value[0]))
    try:
        with quiet():
            pipe = pipeline_class.from_pretrained(folder, dtype=dtype, **{**absent, **(load or {})})
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} does not load as a {name}: {reason}") from error
    return pipe


def _import_component(folder: Path, module: str) -> None:
    if module not in sys.modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{folder} names a component in {module!r}, which cannot be imported") from error


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no folder {hub_id!r} here, and the model hub did not give it: {reason}") from error


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
        raise UserError(f"device {name!r} is not here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
