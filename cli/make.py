"""`emoloop make`: a picture again, from the recipe that its file carries or the log has.

Only typer loads before it runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..domain import UserError
from ..files import check_writable, write_atomic
from ..tools import presets
from ..tools.images.base import encoded
from . import options as opt

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..agents.remake import Remade
    from ..events import RunStarted
    from ..settings import GeneratorSettings, Settings
    from ..traces.recipe import Recipe


def make(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="PICTURE", help="A PNG file; or of the log, a SHA-256 or a run, whose best is made."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="PNG file to write what was made to.")] = None,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    home: opt.Home = None,
    as_json: opt.AsJson = False,
    set_: opt.Set = None,
) -> None:
    """Make a picture again from the recipe that it carries, and say whether the pixels agree (exit code 1 if not)."""
    from rich.console import Console

    from ..settings import load_settings

    console = Console(stderr=True)
    overrides = opt.overrides(context.params)
    settings = load_settings(overrides)
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: name a file, such as {out / 'again.png'}")
        check_writable(out.parent, "--out", "choose another with --out")
    recipe, original, generator = _sought(what, settings, overrides.get("generator", {}))
    opt.say(console, f"{recipe.prompt!r}, seed {recipe.seed}: loading the model …")
    made = _made(recipe, original, generator)
    if out is not None:
        write_atomic(out, _png(made.image, recipe, settings))
    told = {"same": made.same, "difference": made.difference, "pixels": made.pixels, "changed": made.changed}
    told |= {"recipe": recipe.model_dump(mode="json"), "out": None if out is None else str(out)}
    opt.tell(told, as_json, lambda: None)
    opt.say(console, _verdict(made))
    for line in () if made.same else made.changed:
        opt.say(console, line)
    raise typer.Exit(0 if made.same else 1)


def _sought(
    what: str, settings: Settings, given: Mapping[str, Any]
) -> tuple[Recipe, Image, GeneratorSettings]:
    """The recipe, the picture that there is, and the settings of what makes it again.

    The log's word counts more than the file's, which may come from anybody: it names models and adapters of this
    machine.
    """
    from ..traces.recipe import read

    file = Path(what)
    original, carried, sha256 = None, None, what.lower()
    if file.is_file():
        original, carried = read(file)
        sha256 = carried.sha256 if carried else hashlib.sha256(file.read_bytes()).hexdigest()
    known = _logged(what if original is None else sha256, settings)
    if known is not None:
        recipe, started, kept = known
        return recipe, original or kept, _of_the_run(recipe, started, settings, given)
    if original is None:
        raise UserError(f"no file {what!r}, and no picture or run of that name in {settings.home}")
    if carried is None:
        raise UserError(f"{file} carries no recipe, and the log in {settings.home} does not know the picture")
    return carried, original, _of_the_file(file, carried, settings, given)


def _logged(name: str, settings: Settings) -> tuple[Recipe, RunStarted, Image] | None:
    from ..traces.database import log_exists
    from ..traces.recipe import find
    from ..traces.store import open_store

    if not log_exists(settings):
        return None
    with open_store(settings, read_only=True) as store:
        run_id = None
        if re.fullmatch("[0-9a-f]{64}", name.lower()) is None:
            run_id = store.resolve(name)
            best = store.run(run_id).best
            if best is None:
                raise UserError(f"run {run_id!r} has no best picture")
            name = best.sha256
        found = find(store, name.lower(), run_id)
        return None if found is None else (*found, store.blobs.get_image(name.lower()))


def _of_the_run(
    recipe: Recipe, started: RunStarted, settings: Settings, given: Mapping[str, Any]
) -> GeneratorSettings:
    from ..agents.remake import settings_for
    from ..settings import GeneratorSettings

    if "generator" in started.settings.get("objects", ()) and "model" not in given:
        raise UserError(
            f"the generator of run {recipe.run!r} was an object of a Python program: name it by --model"
        )
    logged, own = dict(started.settings.get("generator", {})), settings.generator
    if "://***@" in (logged.get("base_url") or ""):
        logged["base_url"] = own.base_url  # a password is not logged
    base = GeneratorSettings.model_validate({**logged, "api_key": own.api_key, **given})
    return settings_for(recipe, base)


def _of_the_file(
    file: Path, recipe: Recipe, settings: Settings, given: Mapping[str, Any]
) -> GeneratorSettings:
    from ..agents.remake import settings_for

    own = settings.generator
    # A file must not choose what is loaded: only what ships with emoloop is taken at its word.
    if "model" not in given and recipe.model not in (own.model, *presets.GENERATORS):
        raise UserError(f"{file} was made by model {recipe.model!r}: if you trust it, name it by --model")
    if recipe.adapter is not None and own.adapter is None:
        raise UserError(f"{file} was made with adapter {recipe.adapter!r}: name its folder by --adapter")
    said = {**recipe.settings, "model": given.get("model", recipe.model)}
    said["adapter"] = own.adapter if recipe.adapter is not None else None
    return settings_for(recipe, own, said)


def _made(recipe: Recipe, original: Image, settings: GeneratorSettings) -> Remade:
    import asyncio

    from ..agents.remake import remake

    return asyncio.run(remake(recipe, original, settings))


def _png(image: Image, recipe: Recipe, settings: Settings) -> bytes:
    from ..traces.recipe import write

    return write(encoded(image), recipe, settings.traces.metadata)


def _verdict(made: Remade) -> str:
    took = f"made again in {made.seconds:.1f} s"
    if made.same:
        return f"{took}: the same pixels"
    if made.difference is None:
        return f"{took}: another picture, of {made.image.width} × {made.image.height} pixels"
    return f"{took}: other pixels: up to {made.difference} of 255, in {made.pixels:.1%} of them"
