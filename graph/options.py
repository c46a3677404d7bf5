"""The keywords of a run, typed once for all that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import TypedDict

from ..events import Event


class RunOptions(TypedDict, total=False):
    """What one run may have of its own, over the settings; None leaves one as it is."""

    rounds: int | None
    images: int | None
    tolerance: float | None
    patience: int | None
    review: bool | None
    rewriter: str | None
    personas: int | None
    rewrite_first: bool | None
    exhaust: bool | None
    proposals: int | None
    neutral_images: int | None
    max_images: int | None
    max_calls: int | None
    max_seconds: float | None
    finalists: int | None
    oversample: int | None
    memory: int | None


#: Gets each event of a run as it is committed; may be a coroutine function.
OnEvent = Callable[[Event], object]

#: Answers a review: a comment, or an object with `prompt`, `comment`, `stop`; may be a coroutine function.
Reviewer = Callable[[dict[str, Any]], Any]


class ResumeKeywords(TypedDict, total=False):
    """All keywords of `Loop.resume`."""

    on_event: OnEvent | None
    reviewer: Reviewer | None


class RunKeywords(RunOptions, ResumeKeywords, total=False):
    """All keywords of `Loop.run`."""

    seed: int | None
    run_id: str | None
