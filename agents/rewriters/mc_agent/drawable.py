"""What the director checks of every prompt: that each clause can be drawn, and that what was asked for stays.

Both checks compare words and name what they found, so that a person can see why a draft was refused; the words are
data (`undrawable.txt`).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

#: Words of a neutral prompt that name nothing.
_EMPTY = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "by", "with", "and", "or", "to", "from", "for", "into", "over", "under",
    "near", "beside", "among", "is", "are", "was", "there", "it", "its", "his", "her", "their", "some", "this", "that",
    "photo", "picture", "image", "photograph", "painting", "drawing", "i", "want",
))  # fmt: skip


@cache
def _pattern() -> re.Pattern[str]:
    lines = (Path(__file__).parent / "undrawable.txt").read_text(encoding="utf-8").splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def undrawable(prompt: str) -> list[str]:
    """The words and phrases of a prompt that no picture can show, in order."""
    return list(dict.fromkeys(found.lower() for found in _pattern().findall(prompt)))


def lost(neutral: str, prompt: str) -> list[str]:
    """The words of the neutral prompt that name something and are not in the other; endings may differ."""
    there = _words(prompt)
    named = [word for word in _words(neutral) if word not in _EMPTY]
    return [word for word in named if not any(it.startswith(word[: max(3, len(word) - 2)]) for it in there)]


def cut(neutral: str, prompt: str) -> tuple[str, list[str]]:
    """A prompt without the clauses that cannot be drawn, and the words for which they were refused.

    What the neutral prompt says itself may stay.
    """
    allowed = set(undrawable(neutral))
    clauses = re.split(r"(?<=[,;.])\s+", prompt)
    refused = {clause: [it for it in undrawable(clause) if it not in allowed] for clause in clauses}
    kept = " ".join(clause for clause in clauses if not refused[clause])
    words = list(dict.fromkeys(word for clause in clauses for word in refused[clause]))
    return (kept.rstrip(" ,;") if words else prompt), words


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
