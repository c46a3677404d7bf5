"""The rewriter that never changes the prompt: a run then samples one prompt, and its selection is best-of-N."""

from __future__ import annotations

from collections.abc import Sequence

from ...domain import EmotionTarget, Round
from .base import Rewrite


class KeepRewriter:
    """Gives the last round's prompt again; asks no model.

    Args:
        asker: Not used.
        prompt: Not used.
    """

    name = model = "keep"
    prompt_id = "keep@1"
    one_prompt = True

    def __init__(self, asker: object = None, prompt: str = "") -> None:
        pass

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
        return Rewrite(rounds[-1].prompt if rounds else neutral)
