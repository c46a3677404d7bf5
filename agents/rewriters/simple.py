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

from ...domain import EmotionTarget, Example, Missing, Round
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
from .base import KEPT, Rewrite

#: Tokens that one prompt of several may take, with what was changed.
TOKENS = 220


class SimpleRewriter:
    """Rewrites prompts with a chat model.

    Args:
        model: Any LangChain chat model, or an `Asker` that shares one.
        prompt: Name or path of the prompt file.
    """

    name = "simple"
    takes_examples = True

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

    async def rewrite(
        self,
        neutral: str,
        target: EmotionTarget,
        rounds: Sequence[Round] = (),
        *,
        comment: str = "",
        seed: int = 0,
    ) -> Rewrite:
        """See `Rewriter`; an answer that cannot be used leaves the best prompt so far."""
        messages = question(self.prompt, neutral, target, rounds, comment)
        return await self._one(messages, neutral, rounds, seed=seed)

    async def propose(
        self,
        neutral: str,
        target: EmotionTarget,
        rounds: Sequence[Round] = (),
        *,
        count: int,
        start: int = 0,
        comment: str = "",
        seed: int = 0,
        examples: Sequence[Example] = (),
    ) -> list[Rewrite]:
        """Several prompts, which need not differ yet: `proposals.propose` tells them apart.

        In one answer where the prompt file names one that asks so (`several`); else by sampling, each question about
        another one of the best prompts so far, all at once, so that they share batches.

        Args:
            neutral: The neutral prompt.
            target: The wanted emotion.
            rounds: What was tried.
            count: How many are wanted.
            start: Number of the first: those before it were asked for earlier in this round.
            comment: What a person said about the last round.
            seed: For a model that samples.
            examples: Rewrites of other runs that came near the target; shown where one answer gives several prompts.
        """
        if self.prompt.several:
            return await self._several(neutral, target, rounds, count, start, comment, seed, examples)
        asked = (
            self._one(
                question(self.prompt, neutral, target, rounds, comment, number),
                neutral,
                rounds,
                seed=number_seed(seed, number),
                temperature=self.asker.variety,
                number=number,
            )
            for number in range(start, start + count)
        )
        return list(await asyncio.gather(*asked))

    async def _one(
        self,
        messages: list[BaseMessage],
        neutral: str,
        rounds: Sequence[Round],
        *,
        seed: int,
        number: int = 0,
        **more: Any,
    ) -> Rewrite:
        limit = prompt_limit(neutral)
        reply = await self.asker.ask(
            messages, RewriterAnswer, "rewrite", rewrite_schema(limit), seed=seed, **more
        )
        answer = reply.answer
        if isinstance(answer, Missing):
            refused = answer.reason
        elif (refused := unusable(answer.prompt, limit)) is None:
            spent: dict[str, Any] = {"usage": reply.usage, "seconds": reply.seconds}
            return Rewrite(answer.prompt, answer.changes, answer.why, **spent, number=number)
        return replace(_kept(neutral, rounds, refused, reply), number=number)

    async def _several(
        self,
        neutral: str,
        target: EmotionTarget,
        rounds: Sequence[Round],
        count: int,
        start: int,
        comment: str,
        seed: int,
        examples: Sequence[Example],
    ) -> list[Rewrite]:
        limit, prompt = prompt_limit(neutral), load_prompt(self.prompt.several)
        messages = question(prompt, neutral, target, rounds, comment, start, count, examples)
        reply = await self.asker.ask(
            messages,
            RewriterAnswers,
            "rewrites",
            several_schema(limit, count),
            seed=number_seed(seed, start),
            temperature=self.asker.variety,
            max_tokens=TOKENS * (count + 1),
        )
        answer, told = reply.answer, {"prompt_id": prompt.id}
        if isinstance(answer, Missing):
            return [replace(_kept(neutral, rounds, answer.reason, reply), number=start, **told)]
        out: list[Rewrite] = []
        for number, one in enumerate(answer.prompts[:count], start):
            rewrite = Rewrite(one.prompt, one.changes, one.why or answer.why)
            if refused := unusable(one.prompt, limit):
                rewrite = _kept(neutral, rounds, refused, Reply(answer))
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


def _kept(neutral: str, rounds: Sequence[Round], refused: str, reply: Reply[Any]) -> Rewrite:
    kept = best_prompt(neutral, rounds)
    return Rewrite(kept, "", f"{KEPT}: {refused}", refused, reply.usage, reply.seconds, reply.error)


def question(
    prompt: Prompt,
    neutral: str,
    target: EmotionTarget,
    rounds: Sequence[Round],
    comment: str = "",
    number: int | None = None,
    count: int | None = None,
    examples: Sequence[Example] = (),
) -> list[BaseMessage]:
    """What the rewriter is asked, as a chat.

    Args:
        prompt: The prompt file.
        neutral: The neutral prompt.
        target: The wanted emotion.
        rounds: What was tried.
        comment: What a person said about the last round.
        number: Which of several questions it is; None for the only one, which is about rounds.
        count: Prompts that one answer shall give, with a prompt file for several.
        examples: Rewrites of other runs that came near the target, for such a prompt file.
    """
    if number is None:
        told = history.by_round(rounds)
    elif count is None:
        told = history.lineage(neutral, rounds, number)
    else:
        told = history.telling(neutral, rounds, target)
    return prompt.messages(
        prompt=neutral,
        target=target_text(target),
        rounds=told,
        comment=comment,
        limit=prompt_limit(neutral),
        count=count or 1,
        examples=[it._asdict() for it in examples],
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
