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
from ..agents.rewriters import Rewriter, RewriteRequest
from ..domain import Critique, EmotionTarget
from ..graph.parts import Parts
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

AXES = ("valence", "arousal")


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


def caption_error(text: str, target: EmotionTarget) -> float:
    """Mean |ΔV| + |ΔA| by the law over what a caption may show; what it leaves open is drawn anew each time."""
    rng = np.random.default_rng([0, 7])
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
        named = world.everything(scene) if number % 2 else world.sample_named(rng, scene)
        captions.append(world.caption(rng, scene, named))
    drawn = await _drawn(parts, captions, 10_000)
    readings = judge.read(list(drawn.values()))
    subject: list[float | None] = []
    recall: list[float | None] = []
    precision: list[float | None] = []
    for place, seen in zip(drawn, readings, strict=True):
        named = world.parse(captions[place])
        things, shown = {thing.name for thing in named.companions}, set(seen.companions)
        subject.append(float(seen.subject == named.subject))
        recall.append(len(things & shown) / len(things) if things else None)
        precision.append(len(things & shown) / len(shown) if named.nothing_else and shown else None)
    # The critic on generated pictures, against the judge.
    looks = await _looked(parts.critic, drawn.values(), (captions[place] for place in drawn), repeat(NEUTRAL))
    valence, arousal = abs(_points(looks) - _points(readings)).T.tolist()
    columns = {
        "generator_subject_accuracy": subject,
        "generator_companion_accuracy": recall,
        "generator_companion_precision": precision,
        "critic_generated_valence_mae": valence,
        "critic_generated_arousal_mae": arousal,
    }
    return {name: estimate([column], range(len(drawn))) for name, column in columns.items()}


async def _steering(parts: Parts, judge: LawJudge) -> dict[str, Estimate]:
    """Prompts of one subject and place that differ only in light, colour, weather and companions."""
    rng = np.random.default_rng(102)
    captions: list[str] = []
    truths: list[tuple[float, float]] = []
    for _ in range(BASES):
        base = world.sample_scene(rng)
        for _ in range(VARIANTS):
            scene = replace(world.sample_scene(rng), subject=base.subject, place=base.place)
            captions.append(world.caption(rng, scene, world.everything(scene)))
            truths.append(law_of(scene))
    drawn = await _drawn(parts, captions, 20_000)
    wanted, read = np.array(truths)[list(drawn)], _points(judge.read(list(drawn.values())))
    bases = np.array(list(drawn)) // VARIANTS
    found = {}
    for column, axis in enumerate(AXES):
        spans: list[float | None] = []
        ranks: list[float | None] = []
        for base in range(BASES):
            here = read[bases == base, column]
            low, high = np.percentile(here, [2, 98])
            spans.append(float(high - low))
            ranks.append(float(np.asarray(spearmanr(wanted[bases == base, column], here))[0]))
        found[f"steering_{axis}_span"] = estimate([spans], range(BASES))
        found[f"steering_{axis}_spearman"] = estimate([ranks], range(BASES))
    return found


def _neutral(rows: Sequence[Row]) -> dict[str, Estimate]:
    """How much judged feeling varies over seeds of one neutral prompt; its targets share their images."""
    by_prompt = {row.request.prompt: _points(filter(None, row.readings)) for row in rows}
    found = {}
    for column, axis in enumerate(AXES):
        points = by_prompt.values()
        spread = [float(np.std(it[:, column], ddof=1)) if len(it) > 1 else None for it in points]
        found[f"neutral_{axis}_std"] = estimate([spread], list(by_prompt))
    return found


async def _critic(critic: Critic, judge: LawJudge) -> dict[str, Estimate]:
    """Critic and judge on held-out renders, where the law's truth is known."""
    rng = np.random.default_rng(103)
    scenes = [world.sample_scene(rng, world.FOLDS["test"]) for _ in range(RENDERS)]
    pictures = [Image.fromarray(world.render(scene)) for scene in scenes]
    truths = np.array([law_of(scene) for scene in scenes])
    targets = [
        EmotionTarget(valence=round(float(v), 1), arousal=round(float(a), 1))
        for v, a in rng.uniform(-2.5, 2.5, (RENDERS, 2))
    ]
    looks = await _looked(critic, pictures, map(_subject, scenes), targets)
    units = range(RENDERS)
    found = {"critic_valid_json": estimate([[float(look is not None) for look in looks]], units)}
    judged, read = (_points(judge.read(pictures)) - truths).T, (_points(looks) - truths).T
    for axis, its, critics in zip(AXES, judged, read, strict=True):
        found[f"judge_{axis}_mae"] = estimate([abs(its).tolist()], units)
        found[f"critic_{axis}_mae"] = estimate([abs(critics).tolist()], units)
    correlations = map(_correlation, judged, read)
    found["judge_critic_error_correlation"] = max(correlations, key=lambda one: one.value or 0.0)
    right: list[float | None] = []
    clusters: list[int] = []
    for place, (column, axis) in product(units, enumerate(AXES)):
        look, wanted = looks[place], targets[place].point[column]
        if look is None or wanted is None or abs(gap := wanted - truths[place, column]) <= 0.5:
            continue
        right.append(float(f"{'raise' if gap > 0 else 'lower'} {axis}" in look.suggestion))
        clusters.append(place)
    found["critic_direction_accuracy"] = estimate([right], clusters)
    return found


def _subject(scene: Scene) -> str:
    return f"a {world.SUBJECTS[scene.subject].words[0]}"


def _points(seen: Iterable[Any]) -> np.ndarray:
    """(n, 2): valence and arousal of readings; NaN where there is none, which an estimate leaves out."""
    return np.array([[getattr(one, axis, np.nan) for axis in AXES] for one in seen])


def _correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate:
    """Pearson's r as a function of five means, so that the bootstrap serves it like any other figure."""
    x, y = np.asarray(a), np.asarray(b)

    def r(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
        return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))

    return estimate([column.tolist() for column in (x, y, x * x, y * y, x * y)], range(len(x)), r)


async def _critic_sweeps(critic: Critic) -> dict[str, Estimate]:
    """τ between law and critic along nine renders of one subject and place in rising order."""
    rng = np.random.default_rng(104)
    found = {}
    for column, axis in enumerate(AXES):
        taus: list[float | None] = []
        for _ in range(SWEEPS):
            base = world.sample_scene(rng)
            drawn = [
                replace(world.sample_scene(rng), subject=base.subject, place=base.place) for _ in range(60)
            ]
            scenes = [scene for scene in drawn if scene.fold in world.FOLDS["test"]] + drawn
            values = np.array([law_of(scene)[column] for scene in scenes])
            chosen = {int(np.argmin(np.abs(values - aim))) for aim in np.linspace(-2.4, 2.4, 9)}
            steps = sorted(chosen, key=lambda place: values[place])
            pictures = [Image.fromarray(world.render(scenes[place])) for place in steps]
            looks = await _looked(
                critic, pictures, (_subject(scenes[place]) for place in steps), repeat(NEUTRAL)
            )
            read = [look and getattr(look, axis) for look in looks]
            taus.append(rank_tau([values[place] for place in steps], read))
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
        *(rewriter.rewrite(RewriteRequest(prompt, target)) for prompt, target in requests),
        return_exceptions=True,
    )
    kept: list[float | None] = []
    toward: list[float | None] = []
    cuts: list[float] = []
    for (prompt, target), made in zip(requests, rewrites, strict=True):
        text = prompt if isinstance(made, BaseException) else made.prompt
        good = not isinstance(made, BaseException) and made.refused is None
        before, after = caption_error(prompt, target), caption_error(text, target)
        kept.append(float(good and world.parse(text).subject == world.parse(prompt).subject))
        toward.append(float(good and after < before))
        cuts += [1 - after / before] if good else []
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
    rows = [row for row in rows if row.run and len(row.run.rounds) > 1 and row.handed_over]
    first: list[float | None] = [
        caption_error(row.run.rounds[1].prompt, row.request.target) for row in rows if row.run
    ]
    every: list[float | None] = [caption_error(row.prompt, row.request.target) for row in rows]
    won = [error if row.handed_over[0].round else None for error, row in zip(every, rows, strict=True)]
    return {
        name: estimate([first, last], [row.request.prompt for row in rows], lambda one, win: 1 - win / one)
        for name, last in (("rewriter_feedback_gain", won), ("rewriter_feedback_gain_all", every))
    }
