"""The world, its captions and its law: what is frozen stays frozen."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from emoloop.agents.prompt import load_prompt
from emoloop.domain import Emotion
from emoloop.miniature import build, episodes, law, lexicon, world
from emoloop.miniature.icons import sprites
from emoloop.miniature.world import Placed, Scene


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(count)]


def test_the_world_is_as_large_as_promised() -> None:
    assert len(world.SUBJECTS) >= 60
    assert len(world.COMPANIONS) >= 40
    assert len(world.FACTORS["place"]) >= 6
    assert len(world.words()) >= 250
    assert world.SIZE >= 96


def test_world_and_law_are_frozen() -> None:
    """Models, suites and logged rewards refer to version 1: a change here needs a new version, not a new hash."""
    assert (world.VERSION, law.VERSION) == (1, 1)
    drawn = scenes(40)
    pixels = [world.render(scene) for scene in drawn]
    points = [law.affect(scene, image) for scene, image in zip(drawn, pixels, strict=True)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "cd728deb5490f7a7"
    assert float(np.mean(pixels)) == pytest.approx(154.323, abs=0.01)
    assert np.mean(points, axis=0) == pytest.approx([0.0736, 0.2287], abs=1e-3)
    assert np.std(points, axis=0) == pytest.approx([1.7089, 1.2401], abs=1e-3)


def test_every_word_of_a_caption_is_known_and_captions_are_short() -> None:
    rng = np.random.default_rng(1)
    known = set(world.words())
    for scene in scenes(500, 1):
        text = world.caption(rng, scene, world.sample_named(rng, scene))
        assert set(text.split()) <= known
        assert len(text.split()) <= 30


def test_a_caption_is_read_back() -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(300, 2):
        named = world.sample_named(rng, scene)
        parsed = world.parse(world.caption(rng, scene, named))
        assert parsed.subject == scene.subject
        assert parsed.place == (scene.place if named.place else None)
        told = [c for c, wanted in zip(scene.companions, named.companions, strict=True) if wanted]
        assert {c.name for c in parsed.companions} == {c.name for c in told}
        assert {(c.name, c.far) for c in parsed.companions} == {(c.name, c.far) for c in told}
        assert parsed.nothing_else == named.nothing_else


def test_captions_leave_things_out() -> None:
    rng = np.random.default_rng(3)
    silent = [world.sample_named(rng, s) for s in scenes(400, 3)]
    assert 0.1 < np.mean([not n.place and not any(n.companions) for n in silent]) < 0.4


def test_folds_split_compositions() -> None:
    folds = [s.fold for s in scenes(2000, 4)]
    assert set(folds) == set(range(10))
    used = [set(world.FOLDS[name]) for name in ("critic", "judge", "guard", "test")]
    assert sum(map(len, used)) == len(set().union(*used)), "two recognisers share compositions"
    scene = scenes(1)[0]
    assert replace(scene, tint="pink").fold == scene.fold


def test_both_styles_draw_every_thing() -> None:
    assert set(sprites("fluent")) == set(sprites("noto"))
    scene = Scene("dog", "sea", companions=(Placed("sun", "left"), Placed("skull", "right", far=True)))
    assert np.abs(world.render(scene).astype(int) - world.render(scene, "noto")).mean() > 1


def test_the_law_knows_context() -> None:
    fire = (Placed("fire", "left"),)
    cosy = law.content_affect(Scene("cat", "snow", companions=fire))
    plain = law.content_affect(Scene("cat", "meadow", companions=fire))
    assert cosy[0] > plain[0] + 1
    assert cosy[1] < plain[1] - 1
    gift = (Placed("gift", "left"),)
    merry, not_merry = (
        law.content_affect(Scene("dog", p, companions=gift))[0] for p in ("meadow", "graveyard")
    )
    alone = law.content_affect(Scene("dog", "graveyard"))[0]
    assert merry > 1
    assert not_merry < alone


def test_distance_halves_a_companion() -> None:
    near, far = (
        law.content_affect(Scene("bus", "meadow", companions=(Placed("skull", "right", f),))) for f in (0, 1)
    )
    none = law.content_affect(Scene("bus", "meadow"))
    assert np.subtract(far, none) == pytest.approx(np.subtract(near, none) / 2)


def test_colour_follows_valdez_and_mehrabian() -> None:
    gray = np.full((96, 96, 3), 128, np.uint8)
    white = np.full((96, 96, 3), 255, np.uint8)
    (v0, a0), (v1, a1) = law.colour_affect(gray), law.colour_affect(white)
    step = (1 - 128 / 255) / law.BRIGHTNESS_STD
    assert v1 - v0 == pytest.approx(0.69 * step)
    assert a1 - a0 == pytest.approx(-0.31 * step)


def test_the_law_covers_the_plane() -> None:
    points = np.array([law.affect(s, world.render(s)) for s in scenes(600, 5)])
    low, high = np.percentile(points, [2, 98], axis=0)
    assert ((high - low) >= 4).all()


def test_every_category_occurs() -> None:
    found = {law.category(*law.affect(s, world.render(s)), s.companions) for s in scenes(400, 6)}
    assert found == {e.value for e in Emotion}


def test_the_lexicon_is_not_the_law() -> None:
    table = lexicon.table()
    gaps = [np.abs(np.subtract(table[name], law.COMPANION[name])).sum() for name in world.COMPANIONS]
    assert 0.2 < np.mean(gaps) < 1.0


def test_examples_are_what_the_agents_send() -> None:
    """The texts that the LVLM was trained on are the ones that critic and rewriter send."""
    rng = np.random.default_rng(7)
    critic, rewriter = load_prompt("critic-compact"), load_prompt("rewriter-compact")
    example = episodes.critic_example(rng, (0,), score_only=0)
    prompt, target = (line.split(": ", 1)[1] for line in example.task.splitlines())
    system, human = critic.messages(prompt=prompt, target=target)
    assert (system.content, human.content[0]["text"], human.content[1]["text"]) == (
        example.system, example.task, example.question,
    )  # fmt: skip
    for _ in range(20):
        example = episodes.rewriter_example(rng)
        lines = example.task.splitlines()
        rounds = [
            {"prompt": t.split(": ", 1)[1], "valence": float(r.split()[2]), "arousal": float(r.split()[4])}
            for t, r in zip(lines[2::2], lines[3::2], strict=True)
        ]
        prompt, target = (line.split(": ", 1)[1] for line in lines[:2])
        system, human = rewriter.messages(prompt=prompt, target=target, rounds=rounds)
        assert (system.content, human.content[0]["text"], human.content[1]["text"]) == (
            example.system, example.task, example.question,
        )  # fmt: skip


def test_a_description_read_back_is_the_scene():
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = world.sample_scene(rng)
        again = episodes.described(episodes.describe(scene, (0.1, -0.2)))
        placed = [sorted(it.companions, key=lambda c: c.name) for it in (scene, again)]
        assert replace(again, companions=()) == replace(scene, companions=()) and placed[0] == placed[1]


def test_a_critics_prompt_may_name_what_is_not_there():
    rng = np.random.default_rng(6)
    absent = full = 0
    for _ in range(300):
        example = episodes.critic_example(rng, world.FOLDS["critic"], score_only=0)
        assert example.scene is not None
        named = world.parse(example.task.splitlines()[0].removeprefix("prompt: "))
        there = {c.name for c in example.scene.companions}
        lacking = [c.name for c in named.companions if c.name not in there]
        answer = json.loads(example.answer)
        assert not lacking or float(answer["alignment"]) < 1
        absent += bool(lacking)
        full += float(answer["alignment"]) == 1
    assert 60 < absent < 150 and full > 90


@pytest.mark.parametrize(("what", "package"), [("law", "emosent"), ("icons", "resvg_py")])
def test_what_needs_the_extra_says_so_in_one_line(what: str, package: str) -> None:
    words = [what, "icons.json", "fluent"][: 3 if what == "icons" else 1]
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('emosent', 'resvg_py'))\n"
        f"sys.argv[1:] = {words}; runpy.run_module('emoloop.miniature.build', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = f"emoloop: this needs {package}: pip install 'emoloop[miniature]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_the_lexicon_is_not_written_without_the_human_ratings(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "emosent", None)
    monkeypatch.setattr(build, "FILE", tmp_path / "lexicon.json")
    with pytest.raises(ModuleNotFoundError):
        build.build_lexicon()
    assert not (tmp_path / "lexicon.json").exists()
