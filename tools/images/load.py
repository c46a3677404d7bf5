"""From a name, settings or an object to a generator. Model libraries are imported only once it is known which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...settings import GeneratorSettings
from .. import presets
from ..fingerprint import revision
from ..registry import resolve
from .base import Generator, Wrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_generator(
    spec: GeneratorSettings | str | Path | DiffusionPipeline | Generator | object,
    settings: GeneratorSettings | None = None,
) -> Generator:
    """A generator from whatever names one.

    Args:
        spec: Settings; or what replaces their `model`: a preset, folder or hub id, a dotted path to a
            callable that takes the settings and returns a generator (`"my_pkg.my_mod:MyGenerator"`), a pipeline
            object, or a generator object: a whole `Generator` is returned as it is, and one that has only
            `generate` is made whole (`base.Wrapped`). A pipeline object that was loaded from a folder with an
            `emoloop.json` keeps to it.
        settings: Everything else; defaults where None.

    Raises:
        UserError: What is named is not there, is no pipeline, is not supported, or does not fit.
    """
    if isinstance(spec, GeneratorSettings):
        spec, settings = spec.model, spec
    settings = settings or GeneratorSettings()
    if isinstance(spec, str | Path):
        settings = settings.model_copy(update={"model": str(spec)})
        if settings.base_url is not None:
            from .images_api import ImagesApiGenerator

            return ImagesApiGenerator(settings)
        if ":" in str(spec) and not Path(spec).exists():
            return _whole(resolve(str(spec), {}, "generator")(settings))
        from ..threads import apart
        from .pipelines import open_model

        return apart(open_model, settings)
    if hasattr(spec, "generate"):
        return _whole(spec)
    from .diffusers import DiffusersGenerator
    from .pipelines import device_of

    pipe: Any = spec
    if settings.device != "auto":
        pipe.to(device_of(settings.device))
    source = pipe.config.get("_name_or_path")
    file = Path(source) / presets.DEFAULTS_FILE if source else None
    if file is None or not file.is_file():
        return DiffusersGenerator(pipe, settings)
    return DiffusersGenerator(
        pipe, settings, revision=revision(file.parent), defaults=presets.read_json(file)
    )


def _whole(found: Any) -> Any:
    return Wrapped(found) if hasattr(found, "generate") and not isinstance(found, Generator) else found
