"""What a rewriter is told of what was tried: bounded, and the part of it that matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...domain import Candidate, Critique, EmotionTarget, Proposal, Round, mean

#: The best prompts that are varied further, and prompts in a history at most.
PARENTS, LONGEST = 4, 8


def by_round(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """What a prompt file can say of each round that has a critique."""
    told = (_summary(number, it, it.candidates) for number, it in enumerate(rounds))
    return [it for it in told if it]


def by_prompt(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The same of each distinct prompt, over all rounds, in the order in which they were tried."""
    made: dict[str, list[Candidate]] = {}
    first: dict[str, tuple[int, Proposal]] = {}
    for number, round in enumerate(rounds):
        written = {it.prompt: it for it in round.proposals}
        for candidate in round.candidates:
            known = written.get(candidate.prompt) or Proposal(prompt=candidate.prompt)
            first.setdefault(candidate.prompt, (number, known))
            made.setdefault(candidate.prompt, []).append(candidate)
    told = (_summary(*first[prompt], candidates) for prompt, candidates in made.items())
    return [it for it in told if it]


def lineage(neutral: str, rounds: Sequence[Round], number: int) -> list[dict[str, Any]]:
    """What the question of this number varies: the neutral prompt's reading, then one of the best prompts'.

    The best few are taken in turn; questions of high numbers go further down.
    """
    ranked = best_first(by_prompt(rounds))
    if not ranked:
        return []
    some = ranked[:PARENTS] if number < 4 * PARENTS else ranked
    parent = some[number % len(some)]
    return [*(it for it in ranked if it["prompt"] == neutral and it is not parent), parent]


def telling(neutral: str, rounds: Sequence[Round], target: EmotionTarget) -> list[dict[str, Any]]:
    """The prompts that tell most, at most `LONGEST`, in the order in which they were tried.

    The neutral one, the nearest on each wanted axis (which words reach one of two), the best, and the worst.
    """
    tried = by_prompt(rounds)
    ranked = best_first(tried)
    near = [
        min(tried, key=lambda it: abs(it[axis] - aim))
        for axis, aim in zip(("valence", "arousal"), target.point, strict=True)
        if aim is not None and tried
    ]
    wanted = [*(it for it in tried if it["prompt"] == neutral), *ranked[:1], *near, *ranked[-1:], *ranked]
    kept = list(dict.fromkeys(it["prompt"] for it in wanted))[:LONGEST]
    return [it for it in tried if it["prompt"] in kept]


def best_first(tried: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By mean reward; the earliest of equals first, those without a reward last."""
    return sorted(tried, key=lambda it: (it["reward"] is None, -(it["reward"] or 0.0)))


def _summary(number: int, asked: Round | Proposal, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """What a prompt file can say of a prompt's images; None without any critique."""
    read = [(it, it.critique) for it in candidates if isinstance(it.critique, Critique)]
    if not read:
        return None
    ranked = sorted(
        ((it.reward, critique) for it, critique in read if it.reward is not None),
        key=lambda pair: pair[0],
        reverse=True,
    )
    return {
        "number": number,
        "prompt": asked.prompt,
        "changes": asked.changes,
        "count": len(read),
        **{axis: mean([getattr(it, axis) for _, it in read]) for axis in ("valence", "arousal", "alignment")},
        "reward": mean([it.reward for it in candidates if it.reward is not None]),
        "best": ranked[0][1] if ranked else None,
        "worst": ranked[-1][1] if len(ranked) > 1 else None,
    }
