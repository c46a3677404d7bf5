"""One rewrite without feedback, kept for all rounds that follow: what knowing the words brings, without looking."""

from __future__ import annotations

from collections.abc import Sequence

from ...domain import EmotionTarget, Round
from .base import Rewrite
from .simple import SimpleRewriter


class OneShotRewriter(SimpleRewriter):
    """Rewrites the neutral prompt once, shown no round; later rounds keep that prompt."""

    name = "one_shot"
    one_prompt = True

    async def rewrite(
        self,
        neutral: str,
        target: EmotionTarget,
        rounds: Sequence[Round] = (),
        *,
        comment: str = "",
        seed: int = 0,
    ) -> Rewrite:
        """See `Rewriter`."""
        if rounds and rounds[-1].prompt != neutral:
            return Rewrite(rounds[-1].prompt)
        return await super().rewrite(neutral, target, (), comment=comment, seed=seed)
