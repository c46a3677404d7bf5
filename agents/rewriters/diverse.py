"""As many different rewrites as are asked for, made without feedback: what exploring brings, without looking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...domain import EmotionTarget, Round
from .base import Rewrite
from .simple import SimpleRewriter


class DiverseRewriter(SimpleRewriter):
    """Rewrites the neutral prompt, shown no round."""

    name = "diverse"

    async def rewrite(
        self, neutral: str, target: EmotionTarget, rounds: Sequence[Round] = (), **more: Any
    ) -> Rewrite:
        """See `Rewriter`."""
        return await super().rewrite(neutral, target, (), **more)

    async def propose(
        self, neutral: str, target: EmotionTarget, rounds: Sequence[Round] = (), **more: Any
    ) -> list[Rewrite]:
        """See `SimpleRewriter.propose`."""
        return await super().propose(neutral, target, (), **more)
