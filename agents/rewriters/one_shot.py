"""One rewrite without feedback, kept for all rounds that follow: what knowing the words brings, without looking."""

from __future__ import annotations

from dataclasses import replace

from .base import Rewrite, RewriteRequest
from .simple import SimpleRewriter


class OneShotRewriter(SimpleRewriter):
    """Rewrites the neutral prompt once, shown no round; later rounds keep that prompt."""

    name = "one_shot"
    one_prompt = True

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """See `Rewriter`."""
        if request.rounds and request.rounds[-1].prompt != request.neutral:
            return Rewrite(request.rounds[-1].prompt)
        return await super().rewrite(replace(request, rounds=()))
