"""The figures of the affective shortcut, on answers whose values can be told by hand."""

from __future__ import annotations

import pytest
from emoloop.domain import Candidate, EmotionTarget
from emoloop.evals.analysis import Table, figures
from emoloop.evals.records import Reading, Row
from emoloop.evals.shortcut import added, of_rows, self_bleu
from emoloop.evals.suites import Request

TARGETS = [EmotionTarget(valence=-1.5, arousal=1.5, category=it) for it in ("anger", "fear")]


def row(arm: str, neutral: str, prompt: str | None, target=TARGETS[0], reading=(0.0, 0.0)) -> Row:
    if prompt is None:
        return Row(arm, Request(prompt=neutral, target=target), failure="none")
    one = Candidate(round=0, index=0, prompt=prompt, seed=0, sha256="0" * 64)
    valence, arousal = reading
    read = Reading(valence=valence, arousal=arousal, category="anger")
    return Row(arm, Request(prompt=neutral, target=target), handed_over=[one], readings=[read])


def test_what_a_prompt_adds():
    assert added(row("a", "a dog", "A dog, in dim light")) == ["in", "dim", "light"]
    assert added(row("a", "a dog", "the hound in dim light")) == ["the", "hound", "in", "dim", "light"]
    assert added(row("a", "a dog", "a dog")) == []


def test_distinct_sensitivity_recipes_and_violations():
    rows = [
        row("a", "a dog", "a dog in dim light", reading=(0.0, 0.0)),
        row("a", "a dog", "a dog in dim light", TARGETS[1], reading=(3.0, 4.0)),
        row("a", "a cat", "a cat in red light, a mood of hope"),
        row("a", "a cat", None, TARGETS[1]),
    ]
    found = of_rows(rows)
    # "in dim", "dim light" twice each; six bigrams of the third, once each
    assert [it["bigrams"] for it in found] == [2, 2, 6, None]
    assert [it["new_bigrams"] for it in found] == [1, 1, 6, None]
    assert [it["sensitivity"] for it in found] == [5, 5, None, None]
    assert [it["drawability_violations"] for it in found] == [0, 0, 2, None]
    assert [it["recipe_share"] for it in found] == [1, 1, 1, None]
    flat = figures(Table(rows))
    # each neutral prompt weighs the same: (1 + 6) / (2 + 6)
    assert flat["a_distinct_2"] == pytest.approx(7 / 8) and flat["a_sensitivity"] == 5
    assert flat["a_emo_a"] == flat["a_emotion_accuracy"] and "a_self_bleu_low" in flat


def test_self_bleu_is_1_for_a_template_and_low_for_words_of_ones_own():
    same = self_bleu([["in", "dim", "light"]] * 3)
    assert same == [pytest.approx(1.0)] * 3
    assert self_bleu([["in", "dim", "light"], ["red", "boat", "far"], []]) == [0.0, 0.0, None]
    half = self_bleu([["in", "dim", "light"], ["in", "dim", "fog"]])[0]
    # unigrams 2/3, bigrams (1+1)/(2+1), trigrams (0+1)/(1+1)
    assert half == pytest.approx((2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert self_bleu([["a"]]) == [None]


def test_an_arm_that_adds_nothing_has_no_figure_of_it():
    flat = figures(Table([row("base", "a dog", "a dog"), row("base", "a cat", "a cat")]))
    assert "base_distinct_2" not in flat and "base_self_bleu" not in flat
    assert flat["base_drawability_violations"] == 0
