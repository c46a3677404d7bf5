"""What a round is made of: how many prompts are written for it, their events, and which image shows which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..agents.rewriters import Rewrite, Rewriter
from ..events import Event, Rewritten
from ..tools.images.base import Generator
from .parts import prompt_notes
from .state import State


def wanted(number: int, options: Mapping[str, Any]) -> int:
    """How many prompts are to be written for a round: none for a round 0 that only shows the neutral prompt.

    Args:
        number: The round.
        options: The run's; states saved before a round had several prompts say nothing of them.
    """
    proposals = options.get("proposals", 1)
    if number or options["rewrite_first"]:
        return proposals
    return min(proposals - 1, max(0, options["images"] - options.get("neutral_images", 1)))


def shown(prompts: Sequence[str], number: int, options: Mapping[str, Any]) -> list[str]:
    """The prompt of each image: all in turn; in round 0 the neutral one for the first, the others for the rest.

    Args:
        prompts: The round's prompts, at least one.
        number: The round.
        options: As for `wanted`.
    """
    images, own = options["images"], 0
    if number == 0 and not options["rewrite_first"] and len(prompts) > 1:
        own = options["neutral_images"]
    first, others = list(prompts[:1]), prompts[1:] if own else prompts
    return first * own + [others[index % len(others)] for index in range(images - own)]


def rewritten(
    rewrites: Sequence[Rewrite], rewriter: Rewriter, generator: Generator, state: State, number: int
) -> list[Event]:
    """The events of a round's prompts."""
    # Of a later round the number says which question was asked. Those of the first are all alike, and there the
    # neutral prompt is number 0.
    first = 0 if state["options"]["rewrite_first"] else 1
    said, events = list(state["warnings"]), list[Event]()
    for place, rewrite in enumerate(rewrites, first):
        notes = [*rewrite.notes, *prompt_notes(generator, rewrite.prompt, said)]
        said += notes
        event = Rewritten(
            run_id=state["run_id"],
            round=number,
            index=rewrite.number if number else place,
            prompt=rewrite.prompt,
            changes=rewrite.changes,
            why=rewrite.why,
            model=rewriter.model,
            prompt_version=rewrite.prompt_id or rewriter.prompt_id,
            usage=rewrite.usage,
            seconds=round(rewrite.seconds, 4),
            warnings=[*([rewrite.why] if rewrite.refused else []), *notes],
        )
        events.append(event)
    return events
