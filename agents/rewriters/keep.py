"""The rewriter that never changes the prompt: a run then samples one prompt, and its selection is best-of-N."""

from __future__ import annotations

from .base import Rewrite, RewriteRequest


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

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        """See `Rewriter`."""
        return Rewrite(request.rounds[-1].prompt if request.rounds else request.neutral)
