"""What the miniature's LVLM learns from: critiques of pictures, and rewriting episodes.

A critic's example is a rendered scene with the law's reading of it. A rewriter's example does not use the law.
An episode has hidden truths of its own (how its place biases feeling, how each thing departs from what is
commonly felt), readings that follow them, and a next prompt that is an edit of the last one; the target is then
set to what that edit would read (hindsight). So the rewriter learns what words commonly feel like, and to
correct for the difference between the expected reading and the critic's.

Fold 0 is held out of all that is trained on: no prompt of an example names one of its compositions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator as Rng
from numpy.typing import NDArray

from ..agents import schemas
from ..domain import Emotion, EmotionTarget
from . import law, lexicon, world
from .vocabulary import COMPANIONS, FACTORS, LIGHT
from .world import Parsed, Placed, Scene


def signed(value: float) -> str:
    """A score as the answers write it; what lies beyond their one digit is clipped."""
    return schemas.signed(float(np.clip(value, -3.9, 3.9)))


def word(value: str, factor: str) -> str:
    """The first synonym of a factor's value."""
    return FACTORS[factor][value].words[0]


def held_out(prompt: str) -> bool:
    """Whether what a prompt names (subject, place if any, companions) is a composition of fold 0."""
    named = world.parse(prompt)
    return Scene(named.subject or "", named.place or "", companions=named.companions).fold == 0


@dataclass(frozen=True)
class Example:
    """One exchange: the texts of the compact prompts, the answer, and for the critic picture and scene."""

    system: str
    task: str
    question: str
    answer: str
    pixels: NDArray[np.uint8] | None = None
    scene: Scene | None = None


# --- critic --------------------------------------------------------------------------------------------


def _target(rng: Rng) -> tuple[float, float]:
    return round(float(rng.uniform(-2.6, 2.6)), 1), round(float(rng.uniform(-2.6, 2.6)), 1)


def _draw_target(rng: Rng) -> tuple[tuple[float | None, float | None], str]:
    valence, arousal = _target(rng)
    which = rng.random()
    wanted = (valence, None) if which < 0.06 else (None, arousal) if which < 0.12 else (valence, arousal)
    return wanted, _target_text(rng, *wanted, law.category(valence, arousal))


def _target_text(rng: Rng, valence: float | None, arousal: float | None, category: str) -> str:
    named = Emotion(category) if rng.random() < 0.15 else None
    return schemas.target_text(EmotionTarget(valence=valence, arousal=arousal, category=named))


def alignment(named: Parsed, scene: Scene) -> float:
    """How much of what a text names a scene shows: the subject counts twice; 1 where the text names nothing."""
    hits = [named.subject == scene.subject] * 2 if named.subject else []
    hits += [value == getattr(scene, factor) for factor in FACTORS if (value := getattr(named, factor))]
    present = {c.name for c in scene.companions}
    hits += [placed.name in present for placed in named.companions]
    return sum(hits) / len(hits) if hits else 1.0


def describe(scene: Scene, colour: tuple[float, float]) -> str:
    """A scene in the critic's words: subject, surroundings and light, colour's feeling, companions."""
    light = " ".join(word(getattr(scene, f), f) for f in LIGHT)
    things = ", ".join(
        f"{'far ' if c.far else ''}{c.name} {c.side}"
        for c in sorted(scene.companions, key=lambda c: (not COMPANIONS[c.name].sky, c.side))
    )
    return (
        f"{scene.subject} {scene.place} {scene.weather} {light}, colour {signed(colour[0])}{signed(colour[1])}, "
        f"{things or 'nothing else'}"
    )


def described(text: str) -> Scene:
    """The scene of a description: `describe` read back."""
    looks, _, things = text.split(", ", 2)
    subject, place, weather, *light = looks.split()
    named = {f: next(v for v in FACTORS[f] if word(v, f) == w) for f, w in zip(LIGHT, light, strict=True)}
    companions: list[Placed] = []
    for thing in [] if things == "nothing else" else things.split(", "):
        name, side = thing.removeprefix("far ").split()
        companions.append(Placed(name, "left" if side == "left" else "right", thing.startswith("far ")))
    return Scene(subject, place, weather, companions=tuple(companions), **named)


def seen(scene: Scene, pixels: NDArray[np.uint8]) -> dict[str, str]:
    """The first fields of a critique, by the law: analysis, valence, arousal."""
    valence, arousal = law.affect(scene, pixels)
    return {
        "analysis": describe(scene, law.colour_affect(pixels)),
        "valence": signed(valence),
        "arousal": signed(arousal),
    }


def _suggest(rng: Rng, scene: Scene, miss: Sequence[float | None]) -> str:
    words = [
        f"{'raise' if gap > 0 else 'lower'} {axis}"
        for axis, gap in zip(("valence", "arousal"), miss, strict=True)
        if gap is not None and abs(gap) >= 0.3
    ]
    if not words:
        return "keep it"
    gap = np.array([g or 0.0 for g in miss])
    known = lexicon.table()
    present = {c.name: np.array(known[c.name]) for c in scene.companions}
    options = {f"add {n}": np.array(known[n]) for n in COMPANIONS if n not in present}
    options |= {f"drop {n}": -v for n, v in present.items()}
    best = min(options, key=lambda o: float(np.abs(gap - options[o]).sum()) + rng.random() * 0.2)
    return f"{', '.join(words)}; {best}"


def _told(rng: Rng, scene: Scene) -> str:
    """A caption of a scene, or of one that it resembles: what a generator leaves out most often is a companion."""
    told, other = scene, world.sample_scene(rng)
    if rng.random() < 0.25:
        told = replace(told, **{f: getattr(other, f) for f in ("subject", "place") if rng.random() < 0.6})
    if rng.random() < 0.15:
        told = replace(told, **{f: getattr(other, f) for f in (*LIGHT, "weather") if rng.random() < 0.4})
    if rng.random() < 0.35:
        kept = tuple(c for c in scene.companions if rng.random() < 0.5)
        more = world.sample_companions(rng, int(rng.integers(1, 3)), kept)
        told = replace(told, companions=kept + more)
    return world.caption(rng, told, world.sample_named(rng, told))


def critic_example(rng: Rng, folds: tuple[int, ...], score_only: float = 0.12) -> Example:
    """A rendered scene, a prompt that may or may not fit it, and the law's reading of it."""
    scene = world.sample_scene(rng, folds)
    return critique_of(rng, scene, world.render(scene), score_only)


def critique_of(rng: Rng, scene: Scene, pixels: NDArray[np.uint8], score_only: float = 0.0) -> Example:
    """A picture of a scene, a prompt that may or may not fit it, and the law's reading of it.

    The prompt is of fold 0 only where the scene is.
    """
    valence, arousal = law.affect(scene, pixels)
    prompt = _told(rng, scene)
    while held_out(prompt) and scene.fold:
        prompt = _told(rng, scene)
    wanted, target = _draw_target(rng)
    task = f"prompt: {prompt}\ntarget: {target}\n"
    answer = seen(scene, pixels)
    if rng.random() < score_only:
        del answer["analysis"]
        return Example("critic", task, "score:", json.dumps(answer), pixels, scene)
    gaps = [
        None if aim is None else aim - float(answer[axis])
        for aim, axis in zip(wanted, ("valence", "arousal"), strict=True)
    ]
    answer |= {
        "category": law.category(valence, arousal, scene.companions),
        "alignment": f"{alignment(world.parse(prompt), scene):.1f}",
        "suggestion": _suggest(rng, scene, gaps),
    }
    return Example("critic", task, "critique:", json.dumps(answer), pixels, scene)


# --- rewriter ------------------------------------------------------------------------------------------


def write(neutral: str, before: Parsed, after: Parsed) -> str:
    """Write a prompt: the neutral prompt's own words, followed by what `after` names beyond it.

    Args:
        neutral: The neutral prompt.
        before: What it names.
        after: What the result shall name; everything in `before` is kept.
    """
    light = [word(value, f) for f in LIGHT if (value := getattr(after, f)) and value != getattr(before, f)]
    parts = [neutral]
    if after.place and after.place != before.place:
        parts.append(word(after.place, "place"))
    if after.weather and after.weather != before.weather:
        parts.append(word(after.weather, "weather"))
    if light:
        parts.append(f"in {' '.join(light)} light")
    kept = {c.name for c in before.companions}
    things = [c for c in after.companions if c.name not in kept]
    if things:
        names = []
        for placed in things:
            thing = COMPANIONS[placed.name]
            side = f" {placed.side}" if placed.side != thing.side else ""
            names.append(f"a {'far ' if placed.far else ''}{thing.words[0]}{side}")
        parts.append("with " + " and ".join(names))
    if after.nothing_else and not before.nothing_else:
        parts.append("nothing else")
    return " ".join(parts)


def _edit(rng: Rng, base: Parsed, now: Parsed, fresh: bool) -> Parsed:
    """A random edit of `now` that keeps everything in `base`."""
    changed = now
    if fresh:
        changes = ["brightness", "saturation"] + [f for f in ("tint", "weather") if rng.random() < 0.35]
        if base.place is None and rng.random() < 0.3:
            changes.append("place")
        changes += ["companion"] * int(rng.choice(4, p=[0.1, 0.3, 0.35, 0.25]))
    else:
        options = ["brightness", "saturation", "tint", "weather", *["companion"] * 2, "drop", *["swap"] * 2]
        count = int(rng.choice(4, p=[0.05, 0.4, 0.35, 0.2]))
        changes = [options[i] for i in rng.integers(len(options), size=count)]
    for change in changes:
        if change in FACTORS:
            if getattr(base, change) is None:
                values = list(FACTORS[change])
                changed = replace(changed, **{change: values[rng.integers(len(values))]})
        else:
            kept = {c.name for c in base.companions}
            mine = [c for c in changed.companions if c.name not in kept]
            if change in ("drop", "swap") and mine:
                gone = mine[rng.integers(len(mine))]
                changed = replace(changed, companions=tuple(c for c in changed.companions if c is not gone))
            if change in ("companion", "swap") and len(changed.companions) < 3 and not base.nothing_else:
                more = world.sample_companions(rng, 1, changed.companions)
                changed = replace(changed, companions=changed.companions + more)
    return replace(changed, nothing_else=True)


def random_edit(rng: Rng, base: Parsed) -> Parsed:
    """What a first rewrite might name: everything in `base`, light, perhaps weather, and companions."""
    return _edit(rng, base, base, fresh=True)


def _plan(rng: Rng, base: Parsed, now: Parsed, goal: NDArray[np.float64], fresh: bool) -> Parsed:
    """The best of 40 random edits by what words commonly feel like."""

    def gap(option: Parsed) -> float:
        return float(np.abs(np.array(lexicon.score(option)) - goal).sum())

    return min((_edit(rng, base, now, fresh) for _ in range(40)), key=gap)


def _difference(now: Parsed, after: Parsed) -> list[tuple[str, NDArray[np.float64]]]:
    """What an edit does, piece by piece, with what each piece commonly adds; largest first."""
    known = lexicon.table()
    pieces: list[tuple[str, NDArray[np.float64]]] = []
    for factor in FACTORS:
        old, new = getattr(now, factor), getattr(after, factor)
        if new != old:
            delta = np.array(known.get(new or "", (0, 0))) - np.array(known.get(old or "", (0, 0)))
            pieces.append((new if factor == "place" else word(new, factor), delta))

    def adds(placed: Placed) -> NDArray[np.float64]:
        return np.array(known[placed.name]) * placed.weight

    pieces += [(f"drop {c.name}", -adds(c)) for c in now.companions if c not in after.companions]
    pieces += [
        (f"{'far ' if c.far else ''}{c.name}", adds(c)) for c in after.companions if c not in now.companions
    ]
    return sorted(pieces, key=lambda piece: -float(np.abs(piece[1]).sum()))


def rewriter_example(rng: Rng) -> Example:
    """One step of a simulated episode: up to two tried prompts with readings, and the next prompt."""
    while True:
        example, prompts = _episode(rng)
        if not any(map(held_out, prompts)):
            return example


def _episode(rng: Rng) -> tuple[Example, list[str]]:
    """An episode, and every prompt in it."""
    scene = world.sample_scene(rng, world.FOLDS["generator"])
    named = world.sample_named(rng, scene)
    if rng.random() < 0.6:
        named = replace(
            named, weather=False, brightness=False, saturation=False, tint=False, nothing_else=False,
            companions=tuple(False for _ in named.companions) if rng.random() < 0.8 else named.companions,
        )  # fmt: skip
    neutral = world.caption(rng, scene, named)
    base = world.parse(neutral)
    general = rng.normal(0, 0.5, 2)
    offsets = {name: rng.normal(0, 1.1, 2) * (rng.random() < 0.25) for name in COMPANIONS}

    def truth(state: Parsed) -> NDArray[np.float64]:
        own = [offsets[c.name] * c.weight for c in state.companions]
        return np.array(lexicon.score(state)) + general + np.sum(own, axis=0, initial=0.0)

    wanted = np.array(_target(rng))
    history: list[tuple[Parsed, NDArray[np.float64]]] = []
    now = base
    rounds = int(rng.choice(4, p=[0.2, 0.35, 0.3, 0.15]))
    for number in range(rounds):
        reading = np.clip(truth(now) + rng.normal(0, 0.12 if number else 0.3, 2), -3, 3)
        history.append((now, reading))
        bias = reading - np.array(lexicon.score(now))
        now = _plan(rng, base, now, wanted - bias, fresh=number == 0)
    if not history:
        now = _plan(rng, base, base, wanted, fresh=True)
    last, reading = history[-1] if history else (base, np.array(lexicon.score(base)))
    # Hindsight: the target becomes the reading that is expected of the edit, plus noise.
    expected = reading + np.array(lexicon.score(now)) - np.array(lexicon.score(last))
    target = np.clip(np.round(expected + rng.normal(0, 0.12, 2), 1), -2.9, 2.9)
    axes = np.array([1.0, 1.0])
    if rng.random() < 0.1:
        axes[rng.integers(2)] = 0.0
    remaining = (target - np.round(reading, 1)) * axes
    pieces = _difference(last, now)
    steps = [f"need {signed(remaining[0])}{signed(remaining[1])}"]
    for text, delta in pieces[:7]:
        remaining = remaining - delta * axes
        steps.append(f"{text} {signed(remaining[0])}{signed(remaining[1])}")
    answer = {
        "why": ", ".join(steps) if pieces else f"{steps[0]}, keep",
        "changes": ", ".join(text for text, _ in pieces) or "keep",
        "prompt": write(neutral, base, now),
    }
    aims = [float(x) if axis else None for x, axis in zip(target, axes, strict=True)]
    wanted_text = _target_text(rng, aims[0], aims[1], law.category(*target))
    task = f"prompt: {neutral}\ntarget: {wanted_text}\n"
    prompts = [neutral, answer["prompt"]]
    for state, reading in history[-2:]:
        prompts.append(neutral if state is base else write(neutral, base, state))
        task += f"tried: {prompts[-1]}\nread: valence {signed(reading[0])} arousal {signed(reading[1])}\n"
    return Example("rewriter", task, "rewrite:", json.dumps(answer)), prompts
