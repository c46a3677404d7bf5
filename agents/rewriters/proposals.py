"""The prompts of a round: asked for, told apart, ranked before anything is painted.

A rewrite is cheap and a picture is not, so this is where a round's budget is decided: more prompts may be asked for
than are painted, and a ranker says which.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...domain import EmotionTarget, Example, Round
from ...tools.words import addition
from .base import Rewrite, Rewriter
from .mc_agent.panel import Panel
from .simple import number_seed

#: Puts prompts in order before they are painted: their places, best first.
Ranker = Callable[[Sequence[str]], Sequence[int]]

#: What stands in place of a prompt file where another run's rewrite was taken over.
MEMORY = "memory"

#: How often a round's prompts are asked for before it goes on with fewer.
_TRIES = 3


async def propose(
    rewriter: Rewriter,
    neutral: str,
    target: EmotionTarget,
    rounds: Sequence[Round] = (),
    *,
    count: int,
    comment: str = "",
    seed: int = 0,
    rank: Ranker | None = None,
    spare: int = 0,
    examples: Sequence[Example] = (),
    panel: Panel | None = None,
) -> list[Rewrite]:
    """The next round's prompts, different from each other and from all that was tried.

    One prompt is asked for as ever (`Rewriter.rewrite`). Of several, near-duplicates are asked for again, a bounded
    number of times; then there are fewer, with a note, and the round shows these more often.

    Args:
        rewriter: Any rewriter; see `Rewriter` for what several prompts ask of it.
        neutral: The neutral prompt.
        target: The wanted emotion.
        rounds: What was tried.
        count: How many prompts are painted.
        comment: What a person said about the last round.
        seed: For a model that samples.
        rank: Chooses among `count + spare` prompts; None takes the first.
        spare: Prompts that are asked for beyond `count`.
        examples: Rewrites of other runs that came near the target: what they add after their own neutral prompt makes
            up to half of the prompts, behind this one, and a rewriter that `takes_examples` is shown them.
        panel: Who writes, for a rewriter that `takes_panel`.

    Returns:
        At least one; a `refused` one, or one that was tried before, only where there is nothing better.
    """
    panels = panel is not None and getattr(rewriter, "takes_panel", False)
    if count + spare == 1 and not panels:
        return [await rewriter.rewrite(neutral, target, rounds, comment=comment, seed=seed)]
    ask: Any = getattr(rewriter, "propose", None) or partial(_one_by_one, rewriter)
    known = {same(neutral), *(same(it.prompt) for round in rounds for it in round.candidates)}
    found: list[Rewrite] = []
    for like in filter(None, map(partial(_like, neutral), examples)):
        if same(like.prompt) not in known and len(found) < (count + spare) // 2:
            found.append(like)
            known.add(same(like.prompt))
    told: dict[str, Any] = {"panel": panel, "spare": spare} if panels else {}
    if panels:  # its director chooses
        spare, rank = 0, None
    told |= {"examples": examples} if examples and getattr(rewriter, "takes_examples", False) else {}
    left: list[Rewrite] = []
    asked = 0
    for _ in range(_TRIES):
        lacking = count + spare - len(found)
        answers = await ask(
            neutral, target, rounds, count=lacking, start=asked, comment=comment, seed=seed, **told
        )
        asked += lacking
        for answer in answers:
            fresh = answer.refused is None and same(answer.prompt) not in known
            (found if fresh else left).append(answer)
            known.add(same(answer.prompt))
        if len(found) >= count or all(it.error for it in answers):
            break
    order = range(len(found)) if rank is None else rank([it.prompt for it in found])
    kept = [found[place] for place in order][:count] or left[:1]
    kept.sort(key=lambda it: it.prompt_id == MEMORY)  # the first answers for what was asked
    first = _charged(kept[0], [it for it in (*found, *left) if it not in kept])
    if len(found) < count and first.refused is None:
        why = next((f": {it.refused}" for it in left if it.refused), "")
        note = f"the rewriter gave {len(found)} new prompts where {count} were wanted{why}"
        first = replace(first, notes=(note,))
    return [first, *kept[1:]]


def _like(neutral: str, example: Example) -> Rewrite | None:
    """A rewrite that adds what an example added; None where that one says its own prompt otherwise."""
    added = addition(example.neutral, example.prompt)
    why = f"came near the target for {example.neutral!r}"
    return None if added is None else Rewrite(f"{neutral}{added}", why=why, prompt_id=MEMORY)


def same(prompt: str) -> tuple[str, ...]:
    """What near-duplicates have in common: the words, in whatever case and order."""
    return tuple(sorted(re.findall(r"\w+", prompt.casefold())))


async def _one_by_one(
    rewriter: Rewriter,
    neutral: str,
    target: EmotionTarget,
    rounds: Sequence[Round],
    *,
    count: int,
    start: int,
    comment: str,
    seed: int,
) -> list[Rewrite]:
    numbers = range(start, start + count)
    asked = (
        rewriter.rewrite(neutral, target, rounds, comment=comment, seed=number_seed(seed, number))
        for number in numbers
    )
    answers = await asyncio.gather(*asked)
    return [replace(answer, number=number) for number, answer in zip(numbers, answers, strict=True)]


def _charged(rewrite: Rewrite, others: Sequence[Rewrite]) -> Rewrite:
    """A rewrite that answers for those which are not painted: they were asked for too."""
    paid = [it for it in (rewrite, *others) if it.usage or it.seconds]
    usage: Counter[str] = Counter()
    for it in paid:
        usage.update(it.usage)
    calls = {"calls": len(paid)} if len(paid) > 1 else {}
    return replace(rewrite, usage={**usage, **calls}, seconds=max((it.seconds for it in paid), default=0.0))
