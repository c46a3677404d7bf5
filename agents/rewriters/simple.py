"""The simple rewriter: one chat model turns the neutral prompt, the target and what was read into the next prompt.

What it writes goes into the generator unseen, so it is guarded: an answer that is missing, empty or too long
does not become a prompt; the best prompt so far is kept and the reason said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from ...domain import Candidate, Critique, EmotionTarget, Missing, Round
from ..ask import Asker
from ..prompt import Prompt, load_prompt
from ..schemas import PROMPT_LIMIT, REWRITER_SCHEMA, RewriterAnswer, target_text
from .base import KEPT, Rewrite


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
        limit = prompt_limit(neutral)
        messages = question(self.prompt, neutral, target, rounds, comment)
        reply = await self.asker.ask(messages, RewriterAnswer, "rewrite", _schema(limit), seed=seed)
        answer = reply.answer
        if isinstance(answer, Missing):
            refused = answer.reason
        elif not answer.prompt:
            refused = "the rewriter wrote an empty prompt"
        elif len(answer.prompt) > limit:
            refused = f"the rewriter wrote {len(answer.prompt)} characters, {limit} are allowed"
        else:
            return Rewrite(answer.prompt, answer.changes, answer.why, None, reply.usage, reply.seconds)
        kept = best_prompt(neutral, rounds)
        return Rewrite(
            kept,
            "",
            f"{KEPT}: {refused}",
            refused,
            reply.usage,
            reply.seconds,
            reply.error,
        )


def question(
    prompt: Prompt, neutral: str, target: EmotionTarget, rounds: Sequence[Round], comment: str = ""
) -> list[BaseMessage]:
    """What the rewriter is asked, as a chat."""
    return prompt.messages(
        prompt=neutral,
        target=target_text(target),
        rounds=[summary for number, round in enumerate(rounds) if (summary := _summary(number, round))],
        comment=comment,
        limit=prompt_limit(neutral),
    )


def prompt_limit(neutral: str) -> int:
    """Longest rewrite, in characters: `PROMPT_LIMIT`, or twice the neutral prompt where that is longer."""
    return max(PROMPT_LIMIT, 2 * len(neutral))


def best_prompt(neutral: str, rounds: Sequence[Round]) -> str:
    """The prompt of the round with the highest mean reward; the neutral one where nothing was rewarded."""
    scored = [(round.mean_reward, round.prompt) for round in rounds if round.mean_reward is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else neutral


def _schema(limit: int) -> dict[str, Any]:
    if limit == PROMPT_LIMIT:
        return REWRITER_SCHEMA
    properties = {**REWRITER_SCHEMA["properties"], "prompt": {"type": "string", "maxLength": limit}}
    return {**REWRITER_SCHEMA, "properties": properties}


def _summary(number: int, round: Round) -> dict[str, Any] | None:
    """What a prompt file can say of a round; None for a round without any critique."""
    read: list[tuple[Candidate, Critique]] = [
        (candidate, candidate.critique)
        for candidate in round.candidates
        if isinstance(candidate.critique, Critique)
    ]
    if not read:
        return None

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ranked = sorted(
        (pair for pair in read if pair[0].reward is not None),
        key=lambda pair: pair[0].reward or 0.0,
        reverse=True,
    )
    return {
        "number": number,
        "prompt": round.prompt,
        "changes": round.changes,
        "count": len(read),
        "valence": mean([critique.valence for _, critique in read]),
        "arousal": mean([critique.arousal for _, critique in read]),
        "alignment": mean([critique.alignment for _, critique in read]),
        "reward": round.mean_reward,
        "best": ranked[0][1] if ranked else None,
        "worst": ranked[-1][1] if len(ranked) > 1 else None,
    }
