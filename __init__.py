"""emoloop: pictures that make people feel what they were meant to.

A prompt and a target emotion go in; generator, critic and rewriter take turns until the picture carries the
feeling; every try is logged; later the log teaches the diffusion weights. Names load on first use (PEP 562),
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import distill, evaluate, open_log, rewrite
    from .domain import (
        Candidate,
        Critique,
        Draft,
        Emotion,
        EmotionTarget,
        Failure,
        Missing,
        Round,
        RunResult,
        RunStatus,
        StopReason,
        UserError,
    )
    from .events import (
        Critiqued,
        Event,
        GenerationFailed,
        HumanFeedback,
        ImageGenerated,
        PersonaAnswered,
        Rewarded,
        Rewritten,
        RunFinished,
        RunStarted,
    )
    from .graph.loop import Loop, open_loop
    from .graph.options import RunKeywords, RunOptions
    from .graph.rewriting import Rewriting
    from .rl.distill import Distilled
    from .settings import Settings, SettingsOverrides, load_settings
    from .tools.diffusion.apply import Applied, apply
    from .traces.rows import CandidateRow, RunFilter, RunRow
    from .traces.store import TraceStore

__version__ = "0.1.0"

__all__ = [
    "Applied", "Candidate", "CandidateRow", "Critique", "Critiqued", "Distilled", "Draft", "Emotion",
    "EmotionTarget", "Event", "Failure", "GenerationFailed", "HumanFeedback", "ImageGenerated", "Loop",
    "Missing", "PersonaAnswered", "Rewarded", "Rewriting", "Rewritten", "Round", "RunFilter", "RunFinished",
    "RunKeywords", "RunOptions", "RunResult", "RunRow", "RunStarted", "RunStatus", "Settings",
    "SettingsOverrides", "StopReason", "TraceStore", "UserError", "apply", "distill", "evaluate",
    "load_settings", "open_log", "open_loop", "rewrite",
]  # fmt: skip

#: Module → the public names that it defines.
_MODULES = {
    ".api": "distill evaluate open_log rewrite",
    ".domain": "Candidate Critique Draft Emotion EmotionTarget Failure Missing Round "
    "RunResult RunStatus StopReason UserError",
    ".events": "Critiqued Event GenerationFailed HumanFeedback ImageGenerated "
    "PersonaAnswered Rewarded Rewritten RunFinished RunStarted",
    ".graph.loop": "Loop open_loop",
    ".graph.options": "RunKeywords RunOptions",
    ".graph.rewriting": "Rewriting",
    ".rl.distill": "Distilled",
    ".settings": "Settings SettingsOverrides load_settings",
    ".tools.diffusion.apply": "Applied apply",
    ".traces.rows": "CandidateRow RunFilter RunRow",
    ".traces.store": "TraceStore",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
