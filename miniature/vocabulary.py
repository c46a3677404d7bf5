"""The things and factors of the miniature world, read from `world.yaml`, with the words that name each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Thing:
    """A subject or a companion.

    Attributes:
        icon: Name of its icon in the icon sets.
        words: Synonyms that name it.
        sky: A companion stands in the sky, otherwise on the ground.
        side: Default side of a companion.
        emoji: The character by which the Emoji Sentiment Ranking rates it, where it does.
    """

    icon: str
    words: tuple[str, ...]
    sky: bool = False
    side: Side = "left"
    emoji: str | None = None


@dataclass(frozen=True)
class Value:
    """A value of a factor.

    Attributes:
        words: Phrases that name it.
        prior: Probability; 0 where all values of the factor are equally likely.
        look: How it looks: `sky` and `ground` (top and bottom RGB) of a place, `rgb` of a tint, `chroma` of a
            saturation.
    """

    words: tuple[str, ...]
    prior: float
    look: dict[str, Any]


def _thing(icon: str, words: list[str], region: str = "", **more: Any) -> Thing:
    return Thing(icon, tuple(words), region == "sky", **more)


def _value(words: list[str], prior: float = 0.0, **look: Any) -> Value:
    return Value(tuple(words), prior, look)


_DATA: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "world.yaml").read_text(encoding="utf-8"))

SUBJECTS = {name: _thing(**thing) for name, thing in _DATA["subjects"].items()}
COMPANIONS = {name: _thing(**thing) for name, thing in _DATA["companions"].items()}

#: Factor (place, weather, brightness, saturation, tint) → value → what it is.
FACTORS: dict[str, dict[str, Value]] = {
    factor: {name: _value(**value) for name, value in values.items()}
    for factor, values in _DATA["factors"].items()
}
#: The factors that make a scene's light.
LIGHT = ("brightness", "saturation", "tint")
FAR_WORDS, NEAR_WORDS, NOTHING_ELSE = (tuple(_DATA[key]) for key in ("far", "near", "nothing_else"))
#: Words without an article, and words that captions never use but that people add.
BARE, FILLER = frozenset(_DATA["bare"]), frozenset(_DATA["filler"])
