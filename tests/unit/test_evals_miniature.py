"""Health figures: perfect models get perfect figures, broken ones are found out."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from emoloop.agents.rewriters import Rewrite
from emoloop.domain import Candidate, Critique, EmotionTarget, Missing, Round
from emoloop.evals import miniature
from emoloop.evals.records import Reading, Row
from emoloop.evals.suites import Request
from emoloop.miniature import law, world
from emoloop.settings import load_settings
from emoloop.tools.images.base import GeneratedImage
from eval_rows import run_of
from PIL import Image
from scipy.stats import pearsonr


class Oracle:
    """A generator that draws exactly what it is told, a critic and a judge that know the law, a clumsy rewriter."""

    def __init__(self, wrong_subject=False, blind_critic=False):
        self.wrong_subject, self.blind_critic = wrong_subject, blind_critic
        self.generator = self.critic = self
        self.settings = load_settings()

    def rewriter(self, name):
        return self

    async def generate(self, requests):
        found = []
        for request in requests:
            scene = miniature.completed(np.random.default_rng(request.seed), world.parse(request.prompt))
            if self.wrong_subject:
                scene = miniature.replace(scene, subject="snail")
            found.append(GeneratedImage(Image.fromarray(world.render(scene)), request))
        return found

    async def critique(self, image, prompt, target):
        pixels = np.asarray(image).tobytes()
        if self.blind_critic and hashlib.sha256(pixels).digest()[-1] % 2:
            return Missing(reason="down")
        valence, arousal = TRUTHS[pixels]
        words = [
            f"{'raise' if aim > value else 'lower'} {axis}"
            for axis, aim, value in zip(("valence", "arousal"), target.point, (valence, arousal), strict=True)
        ]
        return Critique(valence=valence, arousal=arousal, alignment=1, suggestion=", ".join(words))

    async def rewrite(self, request):
        target = request.target
        light = "bright" if target.valence > 0 else "dark"
        thing = {
            (True, True): "fireworks",
            (True, False): "a dove",
            (False, True): "rage",
            (False, False): "a coffin",
        }
        wanted = thing[target.valence > 0, target.arousal > 0]
        return Rewrite(f"{request.neutral} in {light} light with {wanted} nothing else")


TRUTHS = {}


@pytest.fixture(autouse=True)
def oracle_judge(monkeypatch):
    """The law is asked for every render anyway: remember what it said of which pixels."""
    TRUTHS.clear()
    scenes = {}
    render = world.render

    def remembered(scene, style="fluent"):
        pixels = render(scene, style)
        scenes[pixels.tobytes()] = scene
        TRUTHS[pixels.tobytes()] = law.affect(scene, pixels)
        return pixels

    class Judge:
        def read(self, images):
            found = []
            for image in images:
                scene = scenes[np.asarray(image).tobytes()]
                valence, arousal = TRUTHS[np.asarray(image).tobytes()]
                names = [thing.name for thing in scene.companions]
                found.append(
                    SimpleNamespace(valence=valence, arousal=arousal, subject=scene.subject, companions=names)
                )
            return found

    monkeypatch.setattr(world, "render", remembered)
    monkeypatch.setattr(miniature, "LawJudge", Judge)
    for name, size in {
        "CAPTIONS": 12,
        "BASES": 2,
        "VARIANTS": 12,
        "RENDERS": 16,
        "SWEEPS": 2,
        "REWRITES": 10,
    }.items():
        monkeypatch.setattr(miniature, name, size)


def rows():
    target = EmotionTarget(valence=1.8, arousal=1.5)
    request = Request(prompt="a dog by the sea", target=target)
    readings = [Reading(valence=v, arousal=a) for v, a in ((0, 1), (1, 1), (2, 1))]
    good = "a dog by the sea in bright vivid light with fireworks nothing else"
    bad = "a dog by the sea in dark gray light with a coffin nothing else"
    run = run_of(request, [Round(prompt=text) for text in (request.prompt, bad, good)])
    rows = [Row("base", request, readings=readings)]
    for number, prompt in ((2, good), (0, request.prompt)):
        won = Candidate(round=number, index=0, sha256="x", prompt=prompt, seed=0)
        rows.append(Row("loop", request, run, [won]))
    return rows


def caption_error(prompt):
    return miniature.caption_error(prompt, EmotionTarget(valence=1.8, arousal=1.5))


async def test_perfect_models_get_perfect_figures():
    found = await miniature.measure(Oracle(), rows(), {"image": 0.2, "critique": 0.03})
    value = {name: one.value for name, one in found.items()}
    for name in (
        "generator_subject_accuracy",
        "generator_companion_accuracy",
        "generator_companion_precision",
        "critic_valid_json",
        "critic_direction_accuracy",
        "rewriter_subject_kept",
    ):
        assert value[name] == 1.0, name
    for axis in ("valence", "arousal"):
        assert value[f"critic_{axis}_mae"] == value[f"judge_{axis}_mae"] == 0.0
        assert value[f"critic_generated_{axis}_mae"] == 0.0
        assert value[f"critic_{axis}_tau"] == pytest.approx(1.0)
        assert value[f"steering_{axis}_spearman"] > 0.9
        assert value[f"steering_{axis}_span"] > 2
    assert value["neutral_valence_std"] == 1.0 and value["neutral_arousal_std"] == 0.0
    assert value["generator_seconds_per_image"] == 0.2 and value["critic_seconds_per_image"] == 0.03
    assert 0 < value["rewriter_toward_target"] <= 1
    # The second run was won by a picture of round 0: it has no rewritten caption to speak of.
    first, last = (caption_error(round.prompt) for round in rows()[1].run.rounds[1:])
    unaided = caption_error("a dog by the sea")
    assert value["rewriter_feedback_gain"] == pytest.approx(1 - last / first) and last < first
    assert value["rewriter_feedback_gain_all"] == pytest.approx(1 - (last + unaided) / (2 * first))
    assert (found["rewriter_feedback_gain"].n, found["rewriter_feedback_gain_all"].n) == (1, 2)
    assert all(one.n > 0 for one in found.values())


async def test_every_figure_of_the_issue_is_there():
    found = await miniature.measure(Oracle(), rows(), {"image": 0.2, "critique": 0.03})
    assert set(found) == {
        f"generator_{what}"
        for what in ("subject_accuracy", "companion_accuracy", "companion_precision", "seconds_per_image")
    } | {
        "critic_seconds_per_image",
        "critic_valid_json",
        "critic_direction_accuracy",
        "judge_critic_error_correlation",
        "rewriter_subject_kept",
        "rewriter_toward_target",
        "rewriter_median_cut",
        "rewriter_feedback_gain",
        "rewriter_feedback_gain_all",
    } | {
        pattern.format(axis)
        for axis in ("valence", "arousal")
        for pattern in (
            "steering_{}_span",
            "steering_{}_spearman",
            "neutral_{}_std",
            "critic_{}_mae",
            "critic_generated_{}_mae",
            "critic_{}_tau",
            "judge_{}_mae",
        )
    }


async def test_broken_models_are_found_out():
    found = await miniature.measure(Oracle(wrong_subject=True, blind_critic=True), rows(), {})
    assert found["generator_subject_accuracy"].value < 0.2
    assert 0 < found["critic_valid_json"].value < 1
    assert found["critic_valence_mae"].n < 16
    assert "generator_seconds_per_image" not in found


def test_a_caption_that_says_everything_has_the_laws_own_error():
    scene = world.Scene("dog", "sea", "clear", "bright", "vivid", "none", (world.Placed("balloon", "left"),))
    everything = world.Named(True, True, True, True, True, (True,), True)
    text = world.caption(np.random.default_rng(0), scene, everything)
    valence, arousal = miniature.law_of(scene)
    target = EmotionTarget(valence=1.0, arousal=-1.0)
    assert miniature.caption_error(text, target) == pytest.approx(abs(valence - 1) + abs(arousal + 1))
    assert miniature.caption_error(text, EmotionTarget(valence=1.0)) == pytest.approx(abs(valence - 1))


def test_completions_keep_what_is_named():
    named = world.parse("a dog by the sea in bright light with a balloon")
    rng = np.random.default_rng(0)
    scenes = [miniature.completed(rng, named) for _ in range(30)]
    assert all((s.subject, s.place, s.brightness) == ("dog", "sea", "bright") for s in scenes)
    assert all("balloon" in {c.name for c in s.companions} for s in scenes)
    assert len({s.weather for s in scenes}) > 1 and max(len(s.companions) for s in scenes) > 1
    alone = world.parse("a dog nothing else")
    assert all(not miniature.completed(rng, alone).companions for _ in range(30))


def test_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    a = list(rng.normal(size=50))
    b = [0.6 * x + e for x, e in zip(a, rng.normal(size=50), strict=True)]
    found = miniature._correlation(a, b)
    assert found.value == pytest.approx(pearsonr(a, b).statistic)
    assert found.low < found.value < found.high
