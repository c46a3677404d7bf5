"""Rewriters by name: what gives the prompt of the next round. A new one is a file here and a line in `REWRITERS`."""

from .base import KEPT, REWRITERS, Ranker, Rewrite, Rewriter, RewriteRequest, load_rewriter
from .proposals import propose
from .simple import SimpleRewriter, best_prompt, prompt_limit

__all__ = [
    "KEPT",
    "REWRITERS",
    "Ranker",
    "Rewrite",
    "RewriteRequest",
    "Rewriter",
    "SimpleRewriter",
    "best_prompt",
    "load_rewriter",
    "prompt_limit",
    "propose",
]
