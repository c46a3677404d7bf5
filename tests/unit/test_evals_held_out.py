"""The suites `dev` and `test`: frozen, and of compositions that nothing was trained on."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from emoloop.evals.suites import load_suite
from emoloop.miniature import episodes, world

FROZEN = {
    "dev": "e563542e0d6874f2171eb52204a6a3132d58b48c0e94833fc24729e38de3e3a3",
    "test": "49f3cfce5f12daa248e0f44adf5b4951e80c7ef5ea0af1bff3aebc5f163546df",
    "shortcut": "8da911be1c373b752a3d282ca457f64680d7bffc44b0c7bf7b2afc0fe5628cc7",
    "dev-sweeps": "66f24d4609a442574c1063f84babb1ebf8d1fa77575a09539cf33fe7ceab4031",
    "emofeedback": "01ddf31de44c03c66309b28b7ec95815ea2fa67b44059812623c0f82743457ec",
    "test-sweeps": "ccc5e582e2d8b6a55a002092d49578a7e9abf1ded78db3440df011c90c03b748",
}
TRAINING = Path(world.__file__).parents[1] / "rl" / "presets" / "miniature.prompts.jsonl"


def composition(prompt):
    named = world.parse(prompt)
    return named.subject, named.place, frozenset(thing.name for thing in named.companions)


def compositions(suite):
    return {composition(prompt) for prompt in load_suite(suite).kinds}


@pytest.mark.parametrize("name", FROZEN)
def test_they_are_frozen(name):
    assert load_suite(name).sha256 == FROZEN[name], "a changed suite is a new version: raise it, then freeze"


@pytest.mark.parametrize("name", ["dev", "test"])
def test_they_have_the_kinds_that_people_write_and_targets_of_each_sort(name):
    suite = load_suite(name)
    assert len(suite.requests) == 160
    kinds = {"place": 10, "bare": 2, "companion": 8, "two": 4, "attribute": 8, "paraphrase": 8}
    assert Counter(suite.kinds.values()) == kinds
    assert set(Counter(request.prompt for request in suite.requests).values()) == {4}
    assert {request.target.category for request in suite.requests} > {None, "awe", "fear", "sadness"}
    for prompt, plain in suite.restated.items():
        assert composition(prompt) == composition(plain) and prompt != plain
    assert len(suite.restated) == 8


@pytest.mark.parametrize("name", ["dev", "test"])
def test_no_training_prompt_has_one_of_their_compositions(name):
    assert all(episodes.held_out(prompt) for prompt in load_suite(name).kinds)
    log = {composition(json.loads(line)["prompt"]) for line in TRAINING.read_text().splitlines()}
    assert not log & compositions(name)
    others = [suite for suite in ("dev", "test", "loop", "distill", "shortcut") if suite != name]
    assert not compositions(name) & set().union(*map(compositions, others))
    assert compositions(f"{name}-sweeps") < compositions(name)


def test_the_odd_pairs_are_held_out_too():
    suite = load_suite("shortcut")
    assert len(suite.requests) == 63 and Counter(suite.kinds.values()) == {"merry": 12, "grim": 9}
    assert all(map(episodes.held_out, suite.kinds))
    log = {composition(json.loads(line)["prompt"]) for line in TRAINING.read_text().splitlines()}
    others = set().union(*map(compositions, ("dev", "test", "loop", "distill")))
    assert not compositions("shortcut") & (log | others)


def test_training_examples_name_no_held_out_composition():
    rng = np.random.default_rng(21)
    seen = Counter()
    for _ in range(150):
        for example in (episodes.critic_example(rng, world.FOLDS["critic"]), episodes.rewriter_example(rng)):
            lines = [line.split(": ", 1) for line in example.task.splitlines()]
            prompts = [text for what, text in lines if what in ("prompt", "tried")]
            prompts += [json.loads(example.answer)["prompt"]] if example.system == "rewriter" else []
            seen[example.system] += len(prompts)
            assert not any(map(episodes.held_out, prompts)), prompts
    assert seen["critic"] == 150 and seen["rewriter"] > 400
    # Drawn from the world's own chance about one in ten is: the test would notice.
    drawn = [world.sample_scene(rng) for _ in range(300)]
    assert any(episodes.held_out(world.caption(rng, it, world.sample_named(rng, it))) for it in drawn)
