"""Health of the miniature: how well its generator draws, its critic reads, its rewriter writes, its judge judges.

Truth is the affect law on scenes that nobody was trained on (fold 0 of `miniature.world`). Pictures that the
generator made are read by the law judge, whose own error stands beside them. All scenes and captions are drawn
from fixed seeds, so every number can be made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product, repeat
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from ..agents.critic import Critic
from ..agents.rewriters import Rewriter
from ..domain import Critique, EmotionTarget
from ..graph.nodes import Parts
from ..miniature import law, world
from ..miniature.judge import LawJudge
from ..miniature.world import Named, Parsed, Scene
from ..tools.images.base import GeneratedImage, GenerationError, ImageRequest
from .metrics import rank_tau
from .records import Row
from .stats import Estimate, estimate

#: How many of each; about four minutes of models on two cores.
CAPTIONS, BASES, VARIANTS, RENDERS, SWEEPS, REWRITES = 160, 6, 32, 200, 8, 150

#: Completions over which a caption's own error is averaged.
COMPLETIONS = 16

#: Told to the critic where nothing is aimed at.
NEUTRAL = EmotionTarget(valence=0.0, arousal=0.0)

_ALL = Named(place=True, weather=True, brightness=True, saturation=True, tint=True, nothing_else=True)


async def measure(parts: Parts, rows: Sequence[Row], pace: dict[str, float]) -> dict[str, Estimate]:
    """Every health figure of the miniature by name.

    Args:
        parts: Of a loop over the base models.
        rows: The suite's rows, with readings: the arms `base` and `loop` are looked at.
        pace: Seconds for one image and critique in full batches.
    """
    judge = LawJudge()
    found: dict[str, Estimate] = {
        f"{what}_seconds_per_image": Estimate(pace[key], n=8)
        for what, key in (("generator", "image"), ("critic", "critique"))
        if key in pace
    }
    found |= await _generator(parts, judge)
    found |= await _steering(parts, judge)
    found |= _neutral([row for row in rows if row.arm == "base"])
    found |= await _critic(parts.critic, judge)
    found |= await _critic_sweeps(parts.critic)
    found |= await _rewriter(parts.rewriter(parts.settings.loop.rewriter))
    found |= _feedback([row for row in rows if row.arm == "loop"])
    return found


def law_of(scene: Scene) -> tuple[float, float]:
    """(valence, arousal) of a scene by the law, on its own render."""
    return law.affect(scene, world.render(scene))


def completed(rng: np.random.Generator, named: Parsed) -> Scene:
    """A scene that a text may mean: what it names, and the world's own chance for the rest."""
    drawn = world.sample_scene(rng)
    fields = ("subject", "place", "weather", "brightness", "saturation", "tint")
    told = {field: getattr(named, field) for field in fields if getattr(named, field)}
    rest = 0 if named.nothing_else else max(0, len(drawn.companions) - len(named.companions))
    companions = named.companions + world.sample_companions(rng, rest, named.companions)
    return replace(drawn, **told, companions=companions)


def caption_error(text: str, target: EmotionTarget, seed: int = 0) -> float:
    """Mean |ΔV| + |ΔA| by the law over what a caption may show; what it leaves open is drawn anew each time."""
    rng = np.random.default_rng([seed, 7])
    named = world.parse(text)
    values = [law_of(completed(rng, named)) for _ in range(COMPLETIONS if not named.nothing_else else 4)]
    wanted = [(place, aim) for place, aim in enumerate(target.point) if aim is not None]
    return float(np.mean([sum(abs(value[place] - aim) for place, aim in wanted) for value in values]))


async def _drawn(parts: Parts, captions: Sequence[str], seed: int) -> dict[int, Image.Image]:
    """The pictures that could be made, by the place of their captions."""
    requests = [ImageRequest(caption, seed + place) for place, caption in enumerate(captions)]
    try:
        made: Sequence[Any] = await parts.generator.generate(requests)
    except GenerationError as error:
        made = error.results
    return {place: one.image for place, one in enumerate(made) if isinstance(one, GeneratedImage)}


async def _looked(
    critic: Critic, pictures: Iterable[Image.Image], prompts: Iterable[str], targets: Iterable[EmotionTarget]
) -> list[Critique | None]:
    """The critic's readings; None where it gave none."""
    looks = await asyncio.gather(*map(critic.critique, pictures, prompts, targets))
    return [look if isinstance(look, Critique) else None for look in looks]


async def _generator(parts: Parts, judge: LawJudge) -> dict[str, Estimate]:
    rng = np.random.default_rng(101)
    captions = []
    for number in range(CAPTIONS):
        scene = world.sample_scene(rng, world.FOLDS["test"])
        everything = replace(_ALL, companions=(True,) * len(scene.companions))
        captions.append(
            world.caption(rng, scene, everything if number % 2 else world.sample_named(rng, scene))
        )
    drawn = await _drawn(parts, captions, 10_000)
    readings = judge.read(list(drawn.values()))
    columns: dict[str, list[float | None]] = {"subject": [], "recall": [], "precision": []}
    for place, seen in zip(drawn, readings, strict=True):
        named = world.parse(captions[place])
        things, shown = {thing.name for thing in named.companions}, set(seen.companions)
        columns["subject"].append(float(seen.subject == named.subject))
        columns["recall"].append(len(things & shown) / len(things) if things else None)
        whole = named.nothing_else and shown
        columns["precision"].append(len(things & shown) / len(shown) if whole else None)
    # The critic on generated pictures, against the judge.
    looks = await _looked(parts.critic, drawn.values(), (captions[place] for place in drawn), repeat(NEUTRAL))
    for axis in ("valence", "arousal"):
        columns[axis] = [
            look and abs(getattr(look, axis) - getattr(seen, axis))
            for look, seen in zip(looks, readings, strict=True)
        ]
    names = {
        "subject": "generator_subject_accuracy",
        "recall": "generator_companion_accuracy",
        "precision": "generator_companion_precision",
        "valence": "critic_generated_valence_mae",
        "arousal": "critic_generated_arousal_mae",
    }
    return {names[key]: estimate([column], range(len(drawn))) for key, column in columns.items()}


async def _steering(parts: Parts, judge: LawJudge) -> dict[str, Estimate]:
    """Prompts of one subject and place that differ only in light, colour, weather and companions."""
    rng = np.random.default_rng(102)
    captions: list[str] = []
    truths: list[tuple[float, float]] = []
    for _ in range(BASES):
        base = world.sample_scene(rng)
        for _ in range(VARIANTS):
            scene = replace(world.sample_scene(rng), subject=base.subject, place=base.place)
            captions.append(
                world.caption(rng, scene, replace(_ALL, companions=(True,) * len(scene.companions)))
            )
            truths.append(law_of(scene))
    drawn = await _drawn(parts, captions, 20_000)
    readings = judge.read(list(drawn.values()))
    values: dict[str, list[float | None]] = {}
    for base in range(BASES):
        here = [
            (truths[place], (seen.valence, seen.arousal))
            for place, seen in zip(drawn, readings, strict=True)
            if place // VARIANTS == base
        ]
        for column, axis in enumerate(("valence", "arousal")):
            wanted, read = [truth[column] for truth, _ in here], [seen[column] for _, seen in here]
            low, high = np.percentile(read, [2, 98])
            values.setdefault(f"steering_{axis}_span", []).append(float(high - low))
            values.setdefault(f"steering_{axis}_spearman", []).append(
                float(np.asarray(spearmanr(wanted, read))[0])
            )
    return {name: estimate([column], range(BASES)) for name, column in values.items()}


def _neutral(rows: Sequence[Row]) -> dict[str, Estimate]:
    """How much judged feeling varies over seeds of one neutral prompt; its targets share their images."""
    by_prompt = {row.request.prompt: row for row in rows}
    found = {}
    for axis in ("valence", "arousal"):
        spread: list[float | None] = []
        for row in by_prompt.values():
            read = [getattr(reading, axis) for reading in row.readings if reading]
            spread.append(float(np.std(read, ddof=1)) if len(read) > 1 else None)
        found[f"neutral_{axis}_std"] = estimate([spread], list(by_prompt))
    return found


async def _critic(critic: Critic, judge: LawJudge) -> dict[str, Estimate]:
    """Critic and judge on held-out renders, where the law's truth is known."""
    rng = np.random.default_rng(103)
    scenes = [world.sample_scene(rng, world.FOLDS["test"]) for _ in range(RENDERS)]
    pictures = [Image.fromarray(world.render(scene)) for scene in scenes]
    truths = [law_of(scene) for scene in scenes]
    targets = [
        EmotionTarget(valence=round(float(v), 1), arousal=round(float(a), 1))
        for v, a in rng.uniform(-2.5, 2.5, (RENDERS, 2))
    ]
    looks = await _looked(critic, pictures, map(_subject, scenes), targets)
    seen = judge.read(pictures)
    units = list(range(RENDERS))
    found = {"critic_valid_json": estimate([[float(look is not None) for look in looks]], units)}
    correlations = []
    for column, axis in enumerate(("valence", "arousal")):
        judged = [getattr(one, axis) - truth[column] for one, truth in zip(seen, truths, strict=True)]
        read = [
            look and getattr(look, axis) - truth[column] for look, truth in zip(looks, truths, strict=True)
        ]
        found[f"judge_{axis}_mae"] = estimate([[abs(off) for off in judged]], units)
        found[f"critic_{axis}_mae"] = estimate([[None if off is None else abs(off) for off in read]], units)
        correlations.append(_correlation(judged, read))
    found["judge_critic_error_correlation"] = max(correlations, key=lambda one: one.value or 0.0)
    right: list[float | None] = []
    clusters: list[int] = []
    for place, (column, axis) in product(units, enumerate(("valence", "arousal"))):
        look, wanted = looks[place], targets[place].point[column]
        if look is None or wanted is None or abs(gap := wanted - truths[place][column]) <= 0.5:
            continue
        right.append(float(f"{'raise' if gap > 0 else 'lower'} {axis}" in look.suggestion))
        clusters.append(place)
    found["critic_direction_accuracy"] = estimate([right], clusters)
    return found


def _subject(scene: Scene) -> str:
    return f"a {world.SUBJECTS[scene.subject].words[0]}"


def _correlation(a: Sequence[float], b: Sequence[float | None]) -> Estimate:
    """Pearson's r as a function of five means, so that the bootstrap serves it like any other figure."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if y is not None]
    columns = [[x, y, x * x, y * y, x * y] for x, y in pairs]

    def r(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
        return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))

    return estimate([list(column) for column in zip(*columns, strict=True)], range(len(pairs)), r)


async def _critic_sweeps(critic: Critic) -> dict[str, Estimate]:
    """τ between law and critic along nine renders of one subject and place in rising order."""
    rng = np.random.default_rng(104)
    found = {}
    for column, axis in enumerate(("valence", "arousal")):
        taus: list[float | None] = []
        for _ in range(SWEEPS):
            base = world.sample_scene(rng)
            drawn = [
                replace(world.sample_scene(rng), subject=base.subject, place=base.place) for _ in range(60)
            ]
            scenes = [scene for scene in drawn if scene.fold in world.FOLDS["test"]] + drawn
            values = [law_of(scene)[column] for scene in scenes]
            chosen = sorted(
                {int(np.argmin(np.abs(np.array(values) - aim))) for aim in np.linspace(-2.4, 2.4, 9)},
                key=lambda place: values[place],
            )
            steps = [scenes[place] for place in chosen]
            pictures = [Image.fromarray(world.render(scene)) for scene in steps]
            looks = await _looked(critic, pictures, map(_subject, steps), repeat(NEUTRAL))
            read = [look and getattr(look, axis) for look in looks]
            taus.append(rank_tau([values[place] for place in chosen], read))
        found[f"critic_{axis}_tau"] = estimate([taus], range(SWEEPS))
    return found


async def _rewriter(rewriter: Rewriter) -> dict[str, Estimate]:
    """One rewrite without feedback, by the law on captions, no picture in between."""
    rng = np.random.default_rng(105)
    requests: list[tuple[str, EmotionTarget]] = []
    for _ in range(REWRITES):
        scene = world.sample_scene(rng, world.FOLDS["test"])
        named = Named(place=bool(rng.random() < 0.6), companions=(False,) * len(scene.companions))
        valence, arousal = rng.choice([-1.8, -1.5, -1.0, 1.0, 1.5, 1.8], 2)
        target = EmotionTarget(valence=float(valence), arousal=float(arousal))
        requests.append((world.caption(rng, scene, named), target))
    rewrites = await asyncio.gather(
        *(rewriter.rewrite(prompt, target) for prompt, target in requests), return_exceptions=True
    )
    kept: list[float | None] = []
    toward: list[float | None] = []
    cuts: list[float] = []
    for (prompt, target), made in zip(requests, rewrites, strict=True):
        if isinstance(made, BaseException) or made.refused is not None:
            kept.append(0.0)
            toward.append(0.0)
            continue
        before, after = caption_error(prompt, target), caption_error(made.prompt, target)
        kept.append(float(world.parse(made.prompt).subject == world.parse(prompt).subject))
        toward.append(float(after < before))
        cuts.append(1 - after / before)
    units = [prompt for prompt, _ in requests]
    return {
        "rewriter_subject_kept": estimate([kept], units),
        "rewriter_toward_target": estimate([toward], units),
        "rewriter_median_cut": Estimate(float(np.median(cuts)) if cuts else None, n=len(cuts)),
    }


def _feedback(rows: Sequence[Row]) -> dict[str, Estimate]:
    """How much of round 1's caption error is gone in the winning round, over the suite's own runs.

    Where a lucky picture of round 0 won, the winning round has no rewritten caption, so that such a run says nothing of
    the rewriter; `rewriter_feedback_gain_all` counts it, with the error of its neutral prompt.
    """
    first: list[float | None] = []
    rewritten: list[float | None] = []
    every: list[float | None] = []
    clusters: list[str] = []
    for row in rows:
        if row.run and len(row.run.rounds) > 1 and row.handed_over:
            error = caption_error(row.prompt, row.request.target)
            first.append(caption_error(row.run.rounds[1].prompt, row.request.target))
            rewritten.append(error if row.handed_over[0].round else None)
            every.append(error)
            clusters.append(row.request.prompt)
    return {
        name: estimate([first, last], clusters, lambda one, win: 1 - win / one)
        for name, last in (("rewriter_feedback_gain", rewritten), ("rewriter_feedback_gain_all", every))
    }
