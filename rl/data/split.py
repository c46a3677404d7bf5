"""Which neutral prompts are held out: by hash, so that a prompt never changes sides as the log grows."""

from __future__ import annotations

import hashlib


def normal(prompt: str) -> str:
    """The prompt without differences of case and white space, which make no other prompt."""
    return " ".join(prompt.casefold().split())


def held_out(prompt: str, share: float, salt: str) -> bool:
    """Whether a (normal) neutral prompt belongs to the held-out split."""
    digest = hashlib.sha256(f"{salt}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
