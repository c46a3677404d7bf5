"""The prompts of a round: asked for, told apart, ranked before anything is painted.

A rewrite is cheap and a picture is not, so this is where a round's budget is decided: more prompts may be asked for
than are painted, and a ranker says which.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...domain import Example
from ...tools.words import addition
from .base import Rewrite, Rewriter, RewriteRequest
from .simple import number_seed

#: What stands in place of a prompt file where another run's rewrite was taken over.
MEMORY = "memory"

#: How often a round's prompts are asked for before it goes on with fewer.
_TRIES = 3


async def propose(rewriter: Rewriter, request: RewriteRequest) -> list[Rewrite]:
    """The next round's prompts, different from each other and from all that was tried.

    One prompt is asked for as ever (`Rewriter.rewrite`). Of several, near-duplicates are asked for again, a bounded
    number of times; then there are fewer, with a note, and the round shows these more often. What examples add after
    their own neutral prompt makes up to half of the prompts, behind this one.

    Args:
        rewriter: Any rewriter; see `Rewriter` for what several prompts ask of it.
        request: The request.

    Returns:
        At least one; a `refused` one, or one that was tried before, only where there is nothing better.
    """
    count, rank, spare = request.count, request.rank, request.spare
    chooses = getattr(rewriter, "chooses", False)
    if count + spare == 1 and not chooses:
        return [await rewriter.rewrite(request)]
    ask: Any = getattr(rewriter, "propose", None) or partial(_one_by_one, rewriter)
    known = {same(request.neutral), *(same(it.prompt) for round in request.rounds for it in round.candidates)}
    found: list[Rewrite] = []
    for like in filter(None, map(partial(_like, request.neutral), request.examples)):
        if same(like.prompt) not in known and len(found) < (count + spare) // 2:
            found.append(like)
            known.add(same(like.prompt))
    if chooses:
        spare, rank = 0, None
    left: list[Rewrite] = []
    asked = 0
    for _ in range(_TRIES):
        lacking = count + spare - len(found)
        answers = await ask(replace(request, count=lacking, start=asked))
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
        first = replace(first, notes=(*first.notes, note))
    return [first, *kept[1:]]


def _like(neutral: str, example: Example) -> Rewrite | None:
    """A rewrite that adds what an example added; None where that one says its own prompt otherwise."""
    added = addition(example.neutral, example.prompt)
    why = f"came near the target for {example.neutral!r}"
    return None if added is None else Rewrite(f"{neutral}{added}", why=why, prompt_id=MEMORY)


def same(prompt: str) -> tuple[str, ...]:
    """What near-duplicates have in common: the words, in whatever case and order."""
    return tuple(sorted(re.findall(r"\w+", prompt.casefold())))


async def _one_by_one(rewriter: Rewriter, request: RewriteRequest) -> list[Rewrite]:
    numbers = range(request.start, request.start + request.count)
    asked = (rewriter.rewrite(replace(request, seed=number_seed(request.seed, number))) for number in numbers)
    answers = await asyncio.gather(*asked)
    return [replace(answer, number=number) for number, answer in zip(numbers, answers, strict=True)]


def _charged(rewrite: Rewrite, others: Sequence[Rewrite]) -> Rewrite:
    """A rewrite that answers for those which are not painted: they were asked for too, and what was noted holds."""
    paid = [it for it in (rewrite, *others) if it.usage or it.seconds]
    usage: Counter[str] = Counter()
    for it in paid:
        usage.update(it.usage)
    calls = {"calls": len(paid)} if len(paid) > 1 else {}
    notes = tuple(dict.fromkeys(note for it in (rewrite, *others) for note in it.notes))
    seconds = max((it.seconds for it in paid), default=0.0)
    return replace(rewrite, usage={**usage, **calls}, seconds=seconds, notes=notes)
