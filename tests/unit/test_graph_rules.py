"""Stop policy, retries, rewards, seeds, requests, lines of a collection: the loop's pure parts."""

import json
import sqlite3

import httpx
import pytest
from emoloop.domain import (
    Candidate,
    Critique,
    Emotion,
    EmotionTarget,
    Missing,
    Round,
    StopReason,
    UserError,
    read_target,
)
from emoloop.events import Critiqued, Rewarded
from emoloop.graph.collect import read_line
from emoloop.graph.policy import decide, is_spent, reached
from emoloop.graph.retry import retryable
from emoloop.graph.rounds import shown, wanted
from emoloop.graph.state import Context, candidate_seed, read_prompt, read_review, read_run_id
from emoloop.settings import LoopSettings, lvlm_settings, merged, pruned
from emoloop.tools.reward import EmotionReward, emotion_error, load_reward
from emoloop.traces.fold import Fold
from langgraph.errors import NodeTimeoutError

TARGET = EmotionTarget(valence=2, arousal=-1)


def round_of(number: int, *rewards: float | None, **read: float) -> Round:
    critique = Critique(**{"valence": 0.0, "arousal": 0.0, "alignment": 1.0, **read})
    return Round(
        prompt="p",
        candidates=[
            Candidate(
                round=number,
                index=i,
                prompt="p",
                seed=i,
                sha256=f"{number}{i}",
                critique=critique,
                reward=reward,
            )
            for i, reward in enumerate(rewards)
        ],
    )


def stop(
    *rounds: Round, target: EmotionTarget = TARGET, most: int = 5, patience: int = 2
) -> StopReason | None:
    return decide(fold_of(*rounds), len(rounds) - 1, target, rounds=most, tolerance=0.2, patience=patience)


def fold_of(*rounds: Round) -> Fold:
    fold = Fold("one")
    for candidate in (candidate for round in rounds for candidate in round.candidates):
        at = {"run_id": "one", "round": candidate.round, "index": candidate.index, "sha256": "0" * 64}
        assert candidate.critique is not None
        fold.apply(Critiqued(**at, critique=candidate.critique, model="m", prompt_version="1"))
        fold.apply(Rewarded(**at, name="emotion", version="1", value=candidate.reward))
    return fold


# ---- policy


def test_it_goes_on_while_there_is_hope():
    assert stop(round_of(0, 0.1)) is None
    assert stop(round_of(0, 0.1), round_of(1, 0.2), round_of(2, 0.15)) is None


def test_rounds_run_out():
    assert stop(round_of(0, 0.1), most=1) is StopReason.ROUNDS_USED


def test_patience_counts_from_the_last_better_round():
    worse = [round_of(0, 0.5), round_of(1, 0.4), round_of(2, 0.5)]
    assert stop(*worse) is StopReason.NO_IMPROVEMENT
    assert stop(*worse, patience=3) is None
    assert stop(round_of(0, 0.5), round_of(1, 0.6), round_of(2, 0.4)) is None


def test_a_round_without_any_reward_ends_the_run():
    unread = round_of(1, None, None)
    assert stop(round_of(0, 0.5), unread) is StopReason.NO_REWARD
    for candidate in unread.candidates:
        candidate.critique = Missing(reason="away")
    assert stop(round_of(0, 0.5), unread) is StopReason.NO_CRITIQUE
    assert stop(round_of(0, None, 0.5)) is None


def test_reached_needs_every_wanted_axis_the_category_and_the_content():
    [near] = round_of(0, 1.0, valence=1.8, arousal=-1.2).candidates
    assert reached(near.critique, TARGET, 0.2)
    assert not reached(near.critique, TARGET, 0.1)
    assert reached(near.critique, EmotionTarget(valence=2), 0.2)
    assert not reached(near.critique, EmotionTarget(valence=2, category=Emotion.AMUSEMENT), 0.2)
    [other] = round_of(0, 1.0, valence=2.0, arousal=-1.0, alignment=0.4).candidates
    assert not reached(other.critique, TARGET, 0.2)
    assert stop(round_of(0, 1.0, valence=1.9, arousal=-1.0)) is StopReason.TARGET_REACHED


def test_the_earliest_of_equals_wins():
    assert fold_of(round_of(0, 0.1, 0.5), round_of(1, 0.5)).best == (0, 1)
    assert fold_of(round_of(0, None)).best is None


# ---- retries


def response(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://x")
    return httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, request=request))


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("outer")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(28, "No space left on device"),
        TimeoutError(),
        ConnectionResetError(),
        httpx.ReadTimeout("x"),
        httpx.ConnectError("x"),
        response(429),
        response(503),
        NodeTimeoutError("generate", 1.0, kind="run", run_timeout=1.0),
        sqlite3.OperationalError("database is locked"),
        wrapped(TimeoutError()),
    ],
)
def test_what_passes_is_tried_again(error):
    assert retryable(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        TypeError("x"),
        UserError("x"),
        RuntimeError("shape mismatch"),
        FileNotFoundError("x"),
        PermissionError("x"),
        response(400),
        response(401),
        sqlite3.OperationalError("no such table"),
        wrapped(ValueError("x")),
    ],
)
def test_what_lasts_is_not(error):
    assert not retryable(error)


# ---- rewards


@pytest.mark.parametrize(
    ("target", "read", "expected"),
    [
        (TARGET, {"valence": 2, "arousal": -1, "alignment": 1}, 1.0),
        (TARGET, {"valence": 0.5, "arousal": -1, "alignment": 1}, 0.75),
        (TARGET, {"valence": 2, "arousal": -1, "alignment": 0.4}, 0.7),
        (EmotionTarget(valence=-1), {"valence": -1, "arousal": 3, "alignment": 1}, 1.0),
        (
            EmotionTarget(category=Emotion.AWE),
            {"valence": 1.2, "arousal": 1.5, "alignment": 1, "category": "awe"},
            1.25,
        ),
        (EmotionTarget(category=Emotion.AWE), {"valence": 1.2, "arousal": 1.5, "alignment": 1}, 1.0),
    ],
)
def test_the_default_reward(target, read, expected):
    assert EmotionReward()(Critique(**read), target) == pytest.approx(expected)


def test_the_error_is_a_mean_over_wanted_axes():
    assert emotion_error(Critique(valence=1, arousal=1, alignment=1), TARGET) == 1.5


def test_rewards_by_name_path_and_object():
    assert (load_reward().name, load_reward("emotion").version) == ("emotion", "1")

    def mine(critique: Critique, target: EmotionTarget) -> float:
        return 0.5

    reward = load_reward(mine)
    assert reward.name.endswith("mine") and reward.version == "0"
    assert reward(Critique(valence=0, arousal=0, alignment=0), TARGET) == 0.5
    assert load_reward("emoloop.tools.reward:EmotionReward").name == "emotion"
    with pytest.raises(UserError, match="did you mean 'emotion'"):
        load_reward("emotio")
    with pytest.raises(UserError, match="not callable"):
        load_reward("emoloop.tools.reward:REWARDS")


# ---- requests


def test_seeds_are_stable():
    assert candidate_seed(7, 0, 0) == 2033720171
    seeds = {candidate_seed(7, r, i) for r in range(10) for i in range(100)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("prompt", ["", "  \n ", "x" * 100_000, "a\x00b", "a\udcff", 7, None])
def test_bad_prompts(prompt):
    with pytest.raises(UserError, match="prompt"):
        read_prompt(prompt)


def test_good_prompts():
    assert read_prompt("  a dog\n by the sea ") == "a dog by the sea"
    assert read_prompt("ein Hund 🏴‍☠️ 犬") == "ein Hund 🏴‍☠️ 犬"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs a valence"),
        ({"valence": 7}, "valence 7: a number from -3 to"),
        ({"valence": "much"}, "valence 'much'"),
        ({"category": "joy"}, "unknown emotion 'joy': known are amusement"),
        ({"valance": 1}, "no 'valance'"),
        ({"category": "sadness", "valence": 2}, "drop one"),
        ({"emotion": "awe", "category": "fear"}, "two names"),
        ([1, 2], "a target is"),
    ],
)
def test_bad_targets_in_one_line(given, said):
    with pytest.raises(UserError, match=said) as error:
        read_target(given)
    assert "\n" not in str(error.value)


def test_good_targets():
    assert read_target({"emotion": " AWE "}) == EmotionTarget(category=Emotion.AWE)
    assert read_target({"valence": 1, "arousal": None}) == EmotionTarget(valence=1)
    assert read_target(TARGET) is TARGET


def test_run_ids():
    assert read_run_id("a-b_c.1:2@x") == "a-b_c.1:2@x"
    for bad in ("", "../x", ".hidden", "a b", "x" * 121):
        with pytest.raises(UserError):
            read_run_id(bad)


def test_a_context_goes_over_the_settings():
    options = Context(rounds=2, review=True).over(LoopSettings(images=4))
    given = {"rounds": 2, "images": 4, "tolerance": 0.2, "patience": 2, "review": True}
    given |= {"rewriter": "simple", "rewrite_first": False, "exhaust": False}
    budget = dict.fromkeys(("max_images", "max_calls", "max_seconds"))
    knows = {"finalists": 0, "memory": 0, "personas": 5}
    assert options == given | {"proposals": None, "oversample": None, "neutral_images": 1} | budget | knows
    with pytest.raises(UserError, match="rounds"):
        Context(rounds=0).over(LoopSettings())


def test_reviews():
    assert read_review(None) == {}
    assert read_review(" more sun ") == {"comment": "more sun"}
    assert read_review({"stop": True}) == {"stop": True}
    with pytest.raises(UserError, match="a review is"):
        read_review({"promt": "x"})
    assert read_review({"prompt": " a  dog "}) == {"prompt": "a dog"}
    with pytest.raises(UserError, match="prompt must be text"):
        read_review({"prompt": 5})
    with pytest.raises(UserError, match="comment is text"):
        read_review({"comment": 5})


# ---- lines and words


def test_lines():
    request = read_line(3, '{"prompt": "a dog", "valence": 1, "emotion": "awe", "rounds": 2, "seed": 5}')
    assert request.line == 3 and request.seed == 5 and request.options == {"rounds": 2}
    assert request.target == EmotionTarget(valence=1, category=Emotion.AWE)
    again = read_line(
        1, '{"line": 9, "prompt": "a dog", "target": {"valence": 1}, "error": "x", "run_id": "c-1"}'
    )
    assert again.line == 9 and again.target == EmotionTarget(valence=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"prompt": "a"}', "needs a valence"),
        ('{"prompt": "a", "valence": 9}', "valence 9"),
        ('{"prompt": "", "valence": 1}', "empty"),
        ('{"prompt": "a", "valence": 1, "stpes": 3}', "unknown key stpes"),
        ('{"prompt": "a", "valence": 1, "seed": -1}', "seed -1"),
        ('{"prompt": "a", "valence": 1, "target": {"valence": 1}}', "not both"),
    ],
)
def test_bad_lines(line, said):
    with pytest.raises(UserError, match=said):
        read_line(1, line)


def test_one_word_about_the_lvlm():
    assert lvlm_settings("vllm") == {"engine": "vllm"}
    assert lvlm_settings("http://gpu:8000/v1") == {"engine": "vllm", "base_url": "http://gpu:8000/v1"}
    assert lvlm_settings("qwen25-vl-7b") == {"model": "qwen25-vl-7b"}


def test_settings_merge():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}) == {"a": {"b": 4, "c": 2}, "d": 3}
    assert pruned({"a": {"b": None, "c": 0}, "d": None, "e": {}}) == {"a": {"c": 0}}
    assert json.dumps(merged({}, {"a": {"b": None}})) == '{"a": {"b": null}}'


# ---- what a round is made of


def test_states_saved_before_there_were_several_prompts_have_one():
    saved = {"rounds": 3, "images": 3, "rewrite_first": False}
    assert (wanted(0, saved), wanted(1, saved)) == (0, 1)
    assert shown(["a dog"], 0, saved) == shown(["a dog"], 1, saved) == ["a dog"] * 3
    assert not is_spent(fold_of(round_of(0, 0.5)), saved)


def test_images_share_the_prompts():
    options = {"images": 5, "rewrite_first": False, "proposals": 3, "neutral_images": 2}
    assert (wanted(0, options), wanted(1, options)) == (2, 3)
    assert shown(["n", "a", "b"], 0, options) == ["n", "n", "a", "b", "a"]
    assert shown(["a", "b", "c"], 1, options) == ["a", "b", "c", "a", "b"]
    assert shown(["h"], 0, options) == ["h"] * 5
    assert wanted(0, {**options, "neutral_images": 5}) == 0
    first = {**options, "rewrite_first": True}
    assert (wanted(0, first), shown(["a", "b", "c"], 0, first)) == (3, ["a", "b", "c", "a", "b"])
