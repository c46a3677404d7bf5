"""What a rewriter is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...domain import EmotionTarget, Example, Round, UserError
from ...tools.registry import resolve
from ..ask import Asker
from .mc_agent.panel import Panel

#: How the reason begins where the rewriter's own prompt was refused.
KEPT = "kept the best prompt so far"

#: Rewriters by name; a value is called with the asker and the name of the prompt file.
REWRITERS: dict[str, str] = {
    "diverse": ".agents.rewriters.diverse:DiverseRewriter",
    "keep": ".agents.rewriters.keep:KeepRewriter",
    "mc_agent": ".agents.rewriters.mc_agent.agent:MCAgent",
    "one_shot": ".agents.rewriters.one_shot:OneShotRewriter",
    "simple": ".agents.rewriters.simple:SimpleRewriter",
}


#: Puts prompts in order before they are painted: their places, best first.
Ranker = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class RewriteRequest:
    """What a rewriter is asked.

    Attributes:
        neutral: The neutral prompt, whose content stays.
        target: The wanted emotion.
        rounds: What was tried, in order; none asks for a rewrite without feedback.
        comment: What a person said about the last round.
        seed: For a model that samples.
        count: How many different prompts are wanted.
        spare: Prompts to choose from beyond `count`.
        start: Number of the first: those before it were asked for earlier in this round.
        rank: Chooses among them; None takes the first.
        examples: Rewrites of other runs that came near the target.
        panel: Who writes, where personas do.
    """

    neutral: str
    target: EmotionTarget
    rounds: Sequence[Round] = ()
    comment: str = ""
    seed: int = 0
    count: int = 1
    spare: int = 0
    start: int = 0
    rank: Ranker | None = None
    examples: Sequence[Example] = ()
    panel: Panel | None = None


@dataclass(frozen=True)
class Rewrite:
    """The next prompt.

    Attributes:
        prompt: The prompt to use.
        changes: What was changed; empty where nothing was.
        why: The rewriter's reason, or why its answer was refused.
        refused: Why the rewriter's own prompt is not used; None where it is.
        usage: Tokens: input_tokens, output_tokens, total_tokens; empty where no model was asked.
        seconds: Wall-clock time.
        error: The exception where the model itself failed.
        number: Which of a round's several it is: its question can be made again by that.
        prompt_id: Name and version of the prompt file that asked, where it is not the rewriter's own.
        notes: What a run should be warned of.
    """

    prompt: str
    changes: str = ""
    why: str = ""
    refused: str | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    error: Exception | None = None
    number: int = 0
    prompt_id: str = ""
    notes: tuple[str, ...] = ()


class Rewriter(Protocol):
    """Gives the next round's prompt.

    One that gives several different prompts at once has a `propose` as `SimpleRewriter` has; any other is called once
    for each, with seeds of their own. `chooses = True` says that its `propose` ranks what it writes by itself; one
    whose round is one prompt by its nature sets `one_prompt = True`.

    Attributes:
        name: Its name in settings.
        model: Id of the model that writes, for the log.
        prompt_id: Name and version of its prompt file, for the log.
    """

    name: str

    @property
    def model(self) -> str: ...  # noqa: D102

    @property
    def prompt_id(self) -> str: ...  # noqa: D102

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """The next prompt, one whatever the request's `count`."""
        ...


def load_rewriter(spec: str, asker: Asker, prompt: str = "rewriter") -> Rewriter:
    """A rewriter by name or dotted path (`pkg.mod:Class`), made with the asker and the prompt file.

    Raises:
        UserError: Unknown, not importable, or not a rewriter.
    """
    found: Any = resolve(spec, REWRITERS, "rewriter")
    made: Any = found(asker, prompt) if callable(found) else found
    missing = [key for key in ("name", "model", "prompt_id", "rewrite") if not hasattr(made, key)]
    if missing:
        raise UserError(f"rewriter {spec!r} has no {', '.join(missing)}")
    return made
