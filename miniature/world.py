"""The miniature world, version 1: scenes, the renderer, and captions that name part of them.

A scene is one subject in a place, none to three companions, weather and light. Everything lies on the image
token grid (12 pixels). A network trained for an hour cannot also learn positions that no word names, so a thing has
a default side, and words (left, right, far) move it. What a caption leaves out is drawn at random: a neutral
prompt therefore gives varied pictures, as with real models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator as Rng
from numpy.typing import NDArray

from .icons import FAR, NEAR, SUBJECT, sprites
from .vocabulary import (
    BARE,
    COMPANIONS,
    FACTORS,
    FAR_WORDS,
    FILLER,
    LIGHT,
    NEAR_WORDS,
    NOTHING_ELSE,
    SUBJECTS,
    Side,
)

VERSION = 1
SIZE = 96
TOKEN = 12


@dataclass(frozen=True)
class Placed:
    """A companion in a scene."""

    name: str
    side: Side
    far: bool = False

    @property
    def weight(self) -> float:
        """How much its feeling counts: a far thing half."""
        return 0.5 if self.far else 1.0


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows."""

    subject: str
    place: str
    weather: str = "clear"
    brightness: str = "plain"
    saturation: str = "natural"
    tint: str = "none"
    companions: tuple[Placed, ...] = ()

    @property
    def fold(self) -> int:
        """Split of the scene's composition (subject, place, companions), 0 to 9; 0 is held out everywhere."""
        key = "|".join([self.subject, self.place, *sorted(c.name for c in self.companions)])
        return hashlib.sha256(f"emoloop-miniature-{VERSION}|{key}".encode()).digest()[0] % 10


#: Folds of compositions that each model may train on. No recogniser shares one with another.
FOLDS = {
    "generator": tuple(range(1, 10)),
    "critic": (7, 8, 9),
    "judge": (1, 2, 3),
    "guard": (4, 5, 6),
    "test": (0,),
}


def _draw(rng: Rng, factor: str) -> str:
    names, prior = list(FACTORS[factor]), [value.prior for value in FACTORS[factor].values()]
    return names[rng.choice(len(names), p=prior) if any(prior) else rng.integers(len(names))]


def sample_companions(rng: Rng, count: int, avoid: tuple[Placed, ...] = ()) -> tuple[Placed, ...]:
    """Draw companions that do not share a corner with each other or with those in `avoid`."""
    placed = list(avoid)
    names = list(COMPANIONS)
    for _ in range(200):
        if len(placed) - len(avoid) == count:
            break
        name = names[rng.integers(len(names))]
        thing = COMPANIONS[name]
        side: Side = thing.side
        if rng.random() < 0.3:
            side = "right" if side == "left" else "left"
        taken = {(COMPANIONS[p.name].sky, p.side) for p in placed}
        if name not in {p.name for p in placed} and (thing.sky, side) not in taken:
            placed.append(Placed(name, side, bool(rng.random() < 0.2)))
    return tuple(placed[len(avoid) :])


def sample_scene(rng: Rng, folds: tuple[int, ...] | None = None) -> Scene:
    """Draw a scene from the prior.

    Args:
        rng: NumPy generator.
        folds: Allowed composition folds (`FOLDS`); None allows all.
    """
    while True:
        scene = Scene(
            subject=list(SUBJECTS)[rng.integers(len(SUBJECTS))],
            **{factor: _draw(rng, factor) for factor in FACTORS},
            companions=sample_companions(rng, int(rng.choice(4, p=[0.2, 0.35, 0.3, 0.15]))),
        )
        if folds is None or scene.fold in folds:
            return scene


def factor_indices(scene: Scene) -> list[int]:
    """The number of each factor's value among the values of the factor, in the order of `FACTORS`."""
    return [list(values).index(getattr(scene, factor)) for factor, values in FACTORS.items()]


# --- rendering -----------------------------------------------------------------------------------------

_HORIZON = 60


def _gradient(ends: list[list[int]], rows: int) -> NDArray[np.floating]:
    """Rows from the first colour to the second, shape (rows, 1, 3)."""
    top, bottom = np.asarray(ends, np.float32)
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return top * (1 - t) + bottom * t


@cache
def _background(place: str) -> NDArray[np.float32]:
    canvas, look = np.zeros((SIZE, SIZE, 3), np.float32), FACTORS["place"][place].look
    canvas[:_HORIZON] = _gradient(look["sky"], _HORIZON)
    canvas[_HORIZON:] = _gradient(look["ground"], SIZE - _HORIZON)
    y, x = np.mgrid[:SIZE, :SIZE]

    def paint(mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
        canvas[mask] = colour

    if place == "meadow":
        paint((x - 20) ** 2 / 900 + (y - 62) ** 2 / 100 < 1, (96, 168, 70))
        paint((x - 80) ** 2 / 700 + (y - 62) ** 2 / 64 < 1, (84, 156, 62))
        paint((y > 74) & ((x * 7 + y * 3) % 24 < 2) & (y % 6 < 3), (150, 214, 96))
    elif place == "sea":
        paint((y >= _HORIZON) & (y < 80) & ((x + (y // 4) * 9) % 24 < 9) & (y % 4 == 0), (150, 205, 240))
        paint((y >= 80) & (y < 84), (240, 244, 246))
    elif place == "snow":
        paint((x - 16) ** 2 / 800 + (y - 64) ** 2 / 144 < 1, (234, 241, 248))
        for left in (2, 74, 84):
            paint((abs(x - left - 5) < (y - 44) / 3) & (y > 44) & (y < 62), (96, 138, 120))
    elif place == "desert":
        paint((x - 12) ** 2 / 1200 + (y - 66) ** 2 / 144 < 1, (224, 174, 100))
        paint((x - 84) ** 2 / 900 + (y - 66) ** 2 / 196 < 1, (214, 162, 90))
    elif place == "city":
        for left, top, shade in ((0, 34, 104), (14, 44, 120), (70, 28, 96), (84, 40, 116)):
            house = (x >= left) & (x < left + 12) & (y >= top) & (y < _HORIZON)
            paint(house, (shade, shade, shade + 10))
            windows = (x % 4 == 1) & (y % 5 < 2) & (y >= top + 3) & (y < _HORIZON - 2)
            paint(house & windows, (246, 220, 130))
        paint((y > 76) & (y < 79) & (x % 16 < 8), (236, 226, 170))
    else:
        for left in (3, 15, 73, 85):
            paint((x >= left) & (x < left + 8) & (y >= 52) & (y < 64), (150, 150, 154))
            paint((x - left - 3.5) ** 2 + (y - 52) ** 2 < 16, (150, 150, 154))
            paint((abs(x - left - 3.5) < 1) & (y >= 52) & (y < 60), (92, 92, 98))
            paint((abs(y - 54.5) < 1) & (abs(x - left - 3.5) < 3), (92, 92, 98))
    return canvas


def corner(placed: Placed) -> tuple[int, int, int]:
    """Left, top and side length of a companion, in pixels; all multiples of the token size."""
    sky, size = COMPANIONS[placed.name].sky, FAR if placed.far else NEAR
    left = 0 if placed.side == "left" else SIZE - size
    top = 0 if sky else (SIZE - size if not placed.far else 4 * TOKEN)
    return left, top, size


SUBJECT_BOX = (2 * TOKEN, 2 * TOKEN, SUBJECT)


def _paste(canvas: NDArray[np.float32], sprite: NDArray[np.uint8], left: int, top: int) -> None:
    size = sprite.shape[0]
    alpha = sprite[..., 3:].astype(np.float32) / 255
    region = canvas[top : top + size, left : left + size]
    region[:] = region * (1 - alpha) + sprite[..., :3] * alpha


def _weather(canvas: NDArray[np.floating], weather: str) -> NDArray[np.floating]:
    y, x = np.mgrid[:SIZE, :SIZE]
    if weather == "rain":
        streak = ((x * 2 + y) % 24 < 2) & ((y // 12 + x // 12) % 2 == 0)
        canvas = canvas * 0.88 + np.asarray((120, 130, 150), np.float32) * 0.12
        canvas[streak] = canvas[streak] * 0.35 + np.asarray((190, 212, 240), np.float32) * 0.65
    elif weather == "snowfall":
        flake = ((x % 12 - 3 - (y // 12 % 2) * 5) ** 2 + (y % 12 - 5) ** 2) < 4
        canvas[flake] = canvas[flake] * 0.15 + 255 * 0.85
    elif weather == "fog":
        veil = np.clip(0.18 + 0.37 * np.exp(-(((y - 62) / 26.0) ** 2)), 0, 1)[..., None].astype(np.float32)
        canvas = canvas * (1 - veil) + np.asarray((206, 208, 212), np.float32) * veil
    return canvas


def _light(canvas: NDArray[np.floating], scene: Scene) -> NDArray[np.floating]:
    image = canvas / 255 * np.asarray(FACTORS["tint"][scene.tint].look["rgb"], np.float32)
    luma = image @ np.asarray((0.299, 0.587, 0.114), np.float32)
    image = luma[..., None] + FACTORS["saturation"][scene.saturation].look["chroma"] * (
        image - luma[..., None]
    )
    image = np.clip(image, 0, 1)
    if scene.brightness == "dark":
        image = image * 0.38
    elif scene.brightness == "dim":
        image = image * 0.62
    elif scene.brightness == "bright":
        image = 1 - (1 - image) * 0.58
    return np.clip(image, 0, 1)


def render(scene: Scene, style: str = "fluent") -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        style: Icon set: "fluent", or "noto" for the out-of-domain test.

    Returns:
        RGB array of shape (96, 96, 3).
    """
    sheet = sprites(style)
    canvas = _background(scene.place).copy()
    for placed in scene.companions:
        left, top, size = corner(placed)
        _paste(canvas, sheet[placed.name, size], left, top)
    _paste(canvas, sheet[scene.subject, SUBJECT], SUBJECT_BOX[0], SUBJECT_BOX[1])
    image = _light(_weather(canvas, scene.weather), scene)
    return np.round(image * 255).astype(np.uint8)


# --- captions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """Which factors of a scene a caption names. `nothing_else`: says that no other companion is there."""

    place: bool = False
    weather: bool = False
    brightness: bool = False
    saturation: bool = False
    tint: bool = False
    companions: tuple[bool, ...] = ()
    nothing_else: bool = False


def everything(scene: Scene) -> Named:
    """What a caption names that says all of a scene."""
    return Named(True, True, True, True, True, (True,) * len(scene.companions), True)


def sample_named(rng: Rng, scene: Scene) -> Named:
    """Draw what a caption names: everything (45 %), only the subject and perhaps the place (20 %), or a part."""
    mode = rng.random()
    if mode < 0.20:
        return Named(place=bool(rng.random() < 0.6), companions=(False,) * len(scene.companions))
    full = mode < 0.65

    def keep(p: float) -> bool:
        return bool(rng.random() < p)

    companions = tuple(full or keep(0.6) for _ in scene.companions)
    return Named(
        place=full or keep(0.7),
        weather=keep(0.9 if full and scene.weather != "clear" else 0.5 if full else 0.3),
        brightness=keep(0.85 if full else 0.45),
        saturation=keep(0.85 if full else 0.45),
        tint=keep(0.8 if full and scene.tint != "none" else 0.35),
        companions=companions,
        nothing_else=all(companions) and keep(0.6 if full else 0.3),
    )


def _pick(rng: Rng, words: tuple[str, ...]) -> str:
    return words[0] if rng.random() < 0.5 else words[rng.integers(len(words))]


def _article(word: str) -> str:
    if word in BARE:
        return ""
    return "an " if word[0] in "aeiou" else "a "


def phrase(rng: Rng, placed: Placed) -> str:
    """Words for a companion: its side only where it is not the default, its distance only where it is far."""
    thing = COMPANIONS[placed.name]
    word = _pick(rng, thing.words)
    if placed.far:
        word = f"{_pick(rng, FAR_WORDS)} {word}"
    elif rng.random() < 0.1:
        word = f"{_pick(rng, NEAR_WORDS)} {word}"
    side = ""
    if placed.side != thing.side or rng.random() < 0.15:
        side = f" {placed.side}"
    return f"{_article(word)}{word}{side}"


def caption(rng: Rng, scene: Scene, named: Named) -> str:
    """Write a caption.

    Args:
        rng: NumPy generator: chooses synonyms and word order.
        scene: The scene.
        named: Which of its factors to name.

    Returns:
        Lower-case words without punctuation, at most 30.
    """
    adjectives = [
        _pick(rng, FACTORS[factor][getattr(scene, factor)].words)
        for factor in LIGHT
        if getattr(named, factor)
    ]
    rng.shuffle(adjectives)
    subject = _pick(rng, SUBJECTS[scene.subject].words)
    after: list[str] = []
    place = _pick(rng, FACTORS["place"][scene.place].words) if named.place else ""
    if place:
        after.append(place)
    if named.weather:
        after.append(_pick(rng, FACTORS["weather"][scene.weather].words))
    if adjectives and rng.random() < 0.4:
        after.append(f"in {' '.join(adjectives)} light")
        lead = f"{_article(subject)}{subject}"
    else:
        first = f"{' '.join(adjectives)} {subject}".strip()
        lead = f"{_article(first) if subject != 'books' else ''}{first}"
    things = [phrase(rng, p) for p, wanted in zip(scene.companions, named.companions, strict=True) if wanted]
    if things:
        rng.shuffle(things)
        after.append("with " + " and ".join(things))
    rng.shuffle(after)
    parts = [lead, *after]
    if rng.random() < 0.12 and place:
        parts = [place, lead, *(part for part in after if part != place)]
    if named.nothing_else:
        parts.append(_pick(rng, NOTHING_ELSE))
    return " ".join(parts)


def words() -> list[str]:
    """Every word that a caption can hold, and some that a person may add, sorted."""
    phrases = ["a an with and in light left right", *FILLER, *FAR_WORDS, *NEAR_WORDS, *NOTHING_ELSE]
    for named in (SUBJECTS, COMPANIONS, *FACTORS.values()):
        phrases += [text for one in named.values() for text in one.words]
    return sorted({word for text in phrases for word in text.split()})


@dataclass(frozen=True)
class Parsed:
    """What a text names: the subject, and each background factor or companion that a word of it refers to."""

    subject: str | None = None
    place: str | None = None
    weather: str | None = None
    brightness: str | None = None
    saturation: str | None = None
    tint: str | None = None
    companions: tuple[Placed, ...] = ()
    nothing_else: bool = False


def parse(text: str) -> Parsed:
    """Read a caption back, by its words.

    Args:
        text: Any text; unknown words are skipped.

    Returns:
        The named factors; a companion without a side word stands at its default side.
    """
    tokens = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    joined = f" {' '.join(tokens)} "

    def says(phrases: Iterable[str]) -> bool:
        return any(f" {phrase} " in joined for phrase in phrases)

    companions: dict[str, Placed] = {}
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        for name, thing in COMPANIONS.items():
            if token in thing.words and name not in companions:
                side = after if after in ("left", "right") else thing.side
                companions[name] = Placed(name, side, before in FAR_WORDS)
    return Parsed(
        subject=next((name for token in tokens for name, it in SUBJECTS.items() if token in it.words), None),
        companions=tuple(companions.values()),
        nothing_else=says(NOTHING_ELSE),
        **{f: name for f, values in FACTORS.items() for name, value in values.items() if says(value.words)},
    )
