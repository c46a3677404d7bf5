"""One way to name an extension: a key of a registry, or a dotted path into anybody's code.

Registry values may be dotted paths themselves, so that a registry costs no import until it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from ..domain import UserError


def resolve(spec: Any, registry: Mapping[str, Any], kind: str = "name") -> Any:
    """The object that `spec` names.

    Args:
        spec: A key of `registry`, a dotted path (`"my_pkg.my_mod:MyReward"`), or already the object.
        registry: Name → object, or name → dotted path. A path that starts with "." is relative to this
            package (`".tools.reward:EmotionReward"`).
        kind: What is being named, for the error message ("reward", "objective" …).

    Returns:
        The object, not called and not checked for its type.

    Raises:
        UserError: No such name, module or attribute.
    """
    if not isinstance(spec, str):
        return spec
    target = registry.get(spec, spec)
    if not isinstance(target, str):
        return target
    if ":" not in target:
        near = get_close_matches(spec, registry, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(registry)) or "none"
        raise UserError(
            f"unknown {kind} {spec!r}: {hint}known are {known}, or give a path like my_pkg.my_mod:Name"
        )
    module, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        # An installed program does not look into the current folder, where people keep their own modules.
        sys.path.append(os.getcwd())
    try:
        found: Any = import_module(module, __name__.partition(".")[0] if module.startswith(".") else None)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise UserError(f"{kind} {spec!r}: cannot import {module!r} ({error})") from error
    except AttributeError as error:
        raise UserError(f"{kind} {spec!r}: {module!r} has no {attribute!r}") from error
    return found
