"""emoloop: pictures that make people feel what they were meant to.

A prompt and a target emotion go in; generator, critic and rewriter take turns until the picture carries the
feeling; every try is logged; later the log teaches the diffusion weights. Names load on first use (PEP 562),
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .domain import Candidate, Critique, Emotion, EmotionTarget, RunResult
    from .graph.loop import Loop, open_loop
    from .settings import Settings, load_settings

__version__ = "0.1.0"

_WHERE = {
    "Candidate": ".domain",
    "Critique": ".domain",
    "Emotion": ".domain",
    "EmotionTarget": ".domain",
    "Loop": ".graph.loop",
    "RunResult": ".domain",
    "Settings": ".settings",
    "load_settings": ".settings",
    "open_loop": ".graph.loop",
}

__all__ = [
    "Candidate",
    "Critique",
    "Emotion",
    "EmotionTarget",
    "Loop",
    "RunResult",
    "Settings",
    "load_settings",
    "open_loop",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
