"""The simple rewriter: one chat model turns the neutral prompt, the target and what was read into the next prompt.

What it writes goes into the generator unseen, so it is guarded: an answer that is missing, empty or too long
does not become a prompt; the best prompt so far is kept and the reason said.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from ...domain import Missing, Round
from ..ask import Asker, Reply
from ..prompt import Prompt, load_prompt
from ..schemas import (
    PROMPT_LIMIT,
    REWRITER_SCHEMA,
    RewriterAnswer,
    RewriterAnswers,
    several_schema,
    target_text,
)
from . import history
from .base import KEPT, Rewrite, RewriteRequest

#: Tokens that one prompt of several may take, with what was changed.
TOKENS = 220


class SimpleRewriter:
    """Rewrites prompts with a chat model.

    Args:
        model: Any LangChain chat model, or an `Asker` that shares one.
        prompt: Name or path of the prompt file.
    """

    name = "simple"

    def __init__(self, model: BaseChatModel | Asker, prompt: str = "rewriter"):
        self.asker = model if isinstance(model, Asker) else Asker(model)
        self.prompt = load_prompt(prompt)

    @property
    def prompt_id(self) -> str:
        """Name and version of the prompt file, for the log."""
        return self.prompt.id

    @property
    def model(self) -> str:
        """The model's name, for the log."""
        return self.asker.name

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """See `Rewriter`; an answer that cannot be used leaves the best prompt so far."""
        return await self._one(request, question(self.prompt, request), seed=request.seed)

    async def propose(self, request: RewriteRequest) -> list[Rewrite]:
        """Several prompts, which need not differ yet: `proposals.propose` tells them apart.

        In one answer where the prompt file names one that asks so (`several`), which is shown the examples too; else by
        sampling, each question about another one of the best prompts so far, all at once, so that they share batches.
        """
        if self.prompt.several:
            return await self._several(request, load_prompt(self.prompt.several))
        asked = (
            self._one(
                request,
                question(self.prompt, request, number),
                seed=number_seed(request.seed, number),
                temperature=self.asker.variety,
                number=number,
            )
            for number in range(request.start, request.start + request.count)
        )
        return list(await asyncio.gather(*asked))

    async def _one(
        self, request: RewriteRequest, messages: list[BaseMessage], *, seed: int, number: int = 0, **more: Any
    ) -> Rewrite:
        limit = prompt_limit(request.neutral)
        reply = await self.asker.ask(
            messages, RewriterAnswer, "rewrite", rewrite_schema(limit), seed=seed, **more
        )
        answer = reply.answer
        if isinstance(answer, Missing):
            refused = answer.reason
        elif (refused := unusable(answer.prompt, limit)) is None:
            spent: dict[str, Any] = {"usage": reply.usage, "seconds": reply.seconds}
            return Rewrite(answer.prompt, answer.changes, answer.why, **spent, number=number)
        return replace(_kept(request, refused, reply), number=number)

    async def _several(self, request: RewriteRequest, prompt: Prompt) -> list[Rewrite]:
        limit, count, start = prompt_limit(request.neutral), request.count, request.start
        reply = await self.asker.ask(
            question(prompt, request, start, several=True),
            RewriterAnswers,
            "rewrites",
            several_schema(limit, count),
            seed=number_seed(request.seed, start),
            temperature=self.asker.variety,
            max_tokens=TOKENS * (count + 1),
        )
        answer, told = reply.answer, {"prompt_id": prompt.id}
        if isinstance(answer, Missing):
            return [replace(_kept(request, answer.reason, reply), number=start, **told)]
        out: list[Rewrite] = []
        for number, one in enumerate(answer.prompts[:count], start):
            rewrite = Rewrite(one.prompt, one.changes, one.why or answer.why)
            if refused := unusable(one.prompt, limit):
                rewrite = _kept(request, refused, Reply(answer))
            out.append(replace(rewrite, number=number, **told))
        # The answer is paid for once.
        return [replace(out[0], usage=reply.usage, seconds=reply.seconds), *out[1:]]


def number_seed(seed: int, number: int) -> int:
    """The seed of one of a round's several questions, in [0, 2³¹)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4]) >> 1


def unusable(prompt: str, limit: int) -> str | None:
    """Why a prompt that was written cannot be painted; None where it can."""
    if not prompt:
        return "the rewriter wrote an empty prompt"
    return (
        f"the rewriter wrote {len(prompt)} characters, {limit} are allowed" if len(prompt) > limit else None
    )


def keep_best(request: RewriteRequest, refused: str, written: Rewrite) -> Rewrite:
    """The best prompt so far in the place of one that was refused, which was paid for all the same."""
    best = best_prompt(request.neutral, request.rounds)
    return replace(written, prompt=best, changes="", why=f"{KEPT}: {refused}", refused=refused)


def _kept(request: RewriteRequest, refused: str, reply: Reply[Any]) -> Rewrite:
    return keep_best(
        request, refused, Rewrite("", usage=reply.usage, seconds=reply.seconds, error=reply.error)
    )


def question(
    prompt: Prompt, request: RewriteRequest, number: int | None = None, several: bool = False
) -> list[BaseMessage]:
    """What the rewriter is asked, as a chat.

    Args:
        prompt: The prompt file.
        request: The request.
        number: Which of several questions it is; None for the only one, which is about rounds.
        several: One answer shall give all prompts, with a prompt file for that.
    """
    neutral, rounds = request.neutral, request.rounds
    if number is None:
        told = history.by_round(rounds)
    elif several:
        told = history.telling(neutral, rounds, request.target)
    else:
        told = history.lineage(neutral, rounds, number)
    return prompt.messages(
        prompt=neutral,
        target=target_text(request.target),
        rounds=told,
        comment=request.comment,
        limit=prompt_limit(neutral),
        count=request.count if several else 1,
        examples=[it._asdict() for it in request.examples],
    )


def prompt_limit(neutral: str) -> int:
    """Longest rewrite, in characters: `PROMPT_LIMIT`, or twice the neutral prompt where that is longer."""
    return max(PROMPT_LIMIT, 2 * len(neutral))


def best_prompt(neutral: str, rounds: Sequence[Round]) -> str:
    """The prompt with the highest mean reward of a round's images; the neutral one where nothing was rewarded."""
    rewards: dict[tuple[int, str], list[float]] = {}
    for number, round in enumerate(rounds):
        for it in round.candidates:
            if it.reward is not None:
                rewards.setdefault((number, it.prompt), []).append(it.reward)
    ranked = max(rewards, key=lambda place: sum(rewards[place]) / len(rewards[place]), default=(0, neutral))
    return ranked[1]


def rewrite_schema(limit: int) -> dict[str, Any]:
    """The schema of one rewrite.

    Args:
        limit: Longest prompt, in characters.
    """
    if limit == PROMPT_LIMIT:
        return REWRITER_SCHEMA
    properties = {**REWRITER_SCHEMA["properties"], "prompt": {"type": "string", "maxLength": limit}}
    return {**REWRITER_SCHEMA, "properties": properties}
