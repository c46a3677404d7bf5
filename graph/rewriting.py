"""A rewriter alone: prompts for a target without a picture, a generator or a log."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..agents.rewriters import RewriteRequest, propose
from ..agents.rewriters.mc_agent.panel import Panel
from ..domain import Draft, EmotionTarget, Proposal, read_target
from ..settings import Settings
from .parts import open_agents
from .state import read_prompt


class Rewriting(BaseModel):
    """What a rewriter made of a neutral prompt.

    Attributes:
        prompt: The neutral prompt.
        target: The wanted emotion.
        rewriter: The rewriter's name.
        model: The model's.
        seed: What several prompts and personas were drawn by.
        proposals: The prompts, different from each other.
        drafts: What personas wrote, in the order of the questions; empty for other rewriters.
        warnings: One line each.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    target: EmotionTarget
    rewriter: str
    model: str
    seed: int
    proposals: list[Proposal]
    drafts: list[Draft] = []
    warnings: list[str] = []


async def rewrite(
    prompt: str,
    target: EmotionTarget | Mapping[str, Any],
    settings: Settings,
    *,
    count: int = 1,
    seed: int = 0,
    lvlm: Any = None,
) -> Rewriting:
    """Ask the settings' rewriter.

    Args:
        prompt: The neutral prompt.
        target: The wanted emotion.
        settings: Resolved settings; `loop.rewriter` and `lvlm` count here.
        count: How many prompts are wanted.
        seed: For several prompts, and personas.
        lvlm: A chat model instead of the settings' one.

    Raises:
        UserError: The request is wrong, or the model or rewriter cannot be used.
    """
    neutral, wanted, loop = read_prompt(prompt), read_target(target), settings.loop
    panel = Panel(loop.personas, loop.persona_folder)
    async with AsyncExitStack() as stack:
        _, rewriter = await open_agents(settings, lvlm, stack, images=False)
        writer = rewriter(loop.rewriter)
        request = RewriteRequest(neutral, wanted, seed=seed, count=count, panel=panel)
        rewrites = await propose(writer, request)
    return Rewriting(
        prompt=neutral,
        target=wanted,
        rewriter=writer.name,
        model=writer.model,
        seed=seed,
        proposals=[Proposal(prompt=it.prompt, changes=it.changes, why=it.why) for it in rewrites],
        drafts=[it.draft for _, it in sorted(panel.answers.items())],
        warnings=[note for it in rewrites for note in (*([it.refused] if it.refused else []), *it.notes)],
    )
