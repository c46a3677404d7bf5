"""As many different rewrites as are asked for, made without feedback: what exploring brings, without looking."""

from __future__ import annotations

from dataclasses import replace

from .base import Rewrite, RewriteRequest
from .simple import SimpleRewriter


class DiverseRewriter(SimpleRewriter):
    """Rewrites the neutral prompt, shown no round."""

    name = "diverse"

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """See `Rewriter`."""
        return await super().rewrite(replace(request, rounds=()))

    async def propose(self, request: RewriteRequest) -> list[Rewrite]:
        """See `SimpleRewriter.propose`."""
        return await super().propose(replace(request, rounds=()))
