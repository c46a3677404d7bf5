"""Presets: short names for models, and the defaults that a model brings along.

A model brings its defaults in an `emoloop.json` inside its folder; for models of a hub, whose folders we
don't write, they stand in `presets.yaml`. Nothing else in the package knows a model by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..domain import UserError

Kind = Literal["generator", "lvlm"]

#: Name of the defaults file in a model folder.
DEFAULTS_FILE = "emoloop.json"

#: What it may say of a generator and of an LVLM.
_KNOWN = {
    *("steps", "guidance", "height", "width", "micro_batch", "negative_prompt", "call", "load"),
    *("proposals_per_image", "oversample"),
    *("critic_prompt", "rewriter_prompt", "max_tokens", "batch_size", "threads"),
}


@dataclass(frozen=True)
class Preset:
    """A named model.

    Attributes:
        model: Folder or hub id.
        defaults: What `emoloop.json` would say, for a model that has none.
    """

    model: Path | str
    defaults: dict[str, Any] = field(default_factory=dict)


def _presets(kind: Kind) -> dict[str, Preset]:
    root = Path(__file__).parent
    table = yaml.safe_load((root / "presets.yaml").read_text("utf-8"))
    found = {}
    for name, entry in table[kind].items():
        model = entry.pop("model")
        found[name] = Preset((root / model).resolve() if model.startswith("..") else model, entry)
    return found


GENERATORS, LVLMS = _presets("generator"), _presets("lvlm")
_PRESETS: dict[Kind, dict[str, Preset]] = {"generator": GENERATORS, "lvlm": LVLMS}


def resolve(name: str | Path, kind: Kind = "generator") -> Path | str:
    """Where a model lies.

    Args:
        name: A preset's name, a folder or a hub id ("owner/name").
        kind: Which table of presets to look in.

    Returns:
        A folder, or the hub id as given.

    Raises:
        UserError: Neither a preset, nor an existing folder, nor shaped like a hub id.
    """
    presets = _PRESETS[kind]
    if str(name) in presets:
        found = presets[str(name)].model
        if isinstance(found, Path) and not found.is_dir():
            raise UserError(
                f"the {kind} preset {str(name)!r} has no weights in this installation ({found.name}/)"
            )
        return found
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and "\\" not in text
    if isinstance(name, Path) or not looks_like_hub_id:
        raise UserError(f"no {kind} {text!r}: not a folder, and the presets are {', '.join(presets)}")
    return text


def defaults(name: str | Path, kind: Kind = "generator") -> dict[str, Any]:
    """What the model says about its own use: `emoloop.json` of its folder over its preset's table.

    Args:
        name: As for `resolve`.
        kind: As for `resolve`.

    Raises:
        UserError: As `resolve`; or the file is not a JSON object.
    """
    table = _PRESETS[kind].get(str(name))
    found = resolve(name, kind)
    path = Path(found) / DEFAULTS_FILE if isinstance(found, Path) else None
    return {**(table.defaults if table else {}), **(read_json(path) if path else {})}


def pipeline_of(model: str) -> str | None:
    """The class of a generator's pipeline, by the `model_index.json` of its folder or of the hub's cache, if any."""
    from huggingface_hub import try_to_load_from_cache  # takes its time

    try:
        found = resolve(model)
    except UserError:
        return None
    index = (
        found / "model_index.json"
        if isinstance(found, Path)
        else try_to_load_from_cache(found, "model_index.json")
    )
    return read_json(Path(index)).get("_class_name") if isinstance(index, str | Path) else None


def defaults_if_known(model: str, kind: Kind = "generator") -> dict[str, Any]:
    """As `defaults`; none of a model of which nothing is known here, as a server may have it."""
    try:
        return defaults(model, kind)
    except UserError:
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, such as a model's `emoloop.json`; an empty dict where there is no file.

    Raises:
        UserError: It is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is wanted")
    if path.name == DEFAULTS_FILE and (unknown := sorted(set(content) - _KNOWN)):
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")
    return content
