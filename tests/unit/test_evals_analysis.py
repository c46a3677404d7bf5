"""Rows become figures: by hand on small cases, and planted effects are found while honest arms pass."""

import pytest
from emoloop.domain import EmotionTarget
from emoloop.evals.analysis import Table, figures, flags, of_request, verdict
from emoloop.evals.records import Reading
from emoloop.evals.suites import Request
from eval_rows import CORNERS, off, row, rows_of


def test_a_row_by_hand():
    request = Request(prompt="a dog", target=EmotionTarget(valence=2, arousal=-1))
    readings = [
        Reading(valence=1, arousal=-1, subject_right=True),
        Reading(valence=2, arousal=1, subject_right=False),
        None,
    ]
    guards = [
        Reading(alignment=1.0, features=[1, 0]),
        Reading(alignment=0.5, features=[0, 1]),
        Reading(alignment=0.0, features=[1, 0]),
    ]
    found = of_request(row("base", request, readings, guards, [0.5, None, 0.7]))
    assert found["error"] == pytest.approx((1 + 2) / 2)
    assert (found["valence_error"], found["arousal_error"]) == (0.5, 1.0)
    assert found["subject_accuracy"] == 0.5
    assert found["alignment"] == 0.5
    assert found["diversity"] == pytest.approx(2 / 3)  # of three pairs two are at right angles
    assert found["reward"] == pytest.approx(0.6)
    assert found["emotion_accuracy"] is None


def test_the_gain_is_split_and_adds_up():
    arms = {"base": 2.4, "rewrite": 1.2, "best_of_n": 2.0, "rewrite_best_of_n": 1.0, "loop": 0.5}
    table = Table(rows_of({arm: (miss, 0.9, 0.5, 0.0) for arm, miss in arms.items()}))
    parts = {gain["part"]: gain for gain in table.gains()}
    assert set(parts) == {"selection", "words", "both", "feedback", "total"}
    assert parts["both"]["value"] + parts["feedback"]["value"] == pytest.approx(parts["total"]["value"])
    assert parts["feedback"]["low"] > 0 and parts["feedback"]["p"] < 0.01
    assert verdict(table.gains()).startswith("Feedback adds to")
    assert parts["feedback"]["n"] == 48 and parts["feedback"]["clusters"] == 12


@pytest.mark.parametrize(("loop", "said"), [(1.0, "adds nothing"), (1.6, "hurts")])
def test_the_report_says_so_when_feedback_adds_nothing(loop, said):
    arms = {"base": 2.4, "rewrite_best_of_n": 1.0, "loop": loop}
    table = Table(rows_of({arm: (miss, 0.9, 0.5, 0.0) for arm, miss in arms.items()}, noise=0.5))
    assert said in verdict(table.gains())


def test_without_the_arms_there_is_no_verdict():
    table = Table(rows_of({"base": (2.0, 0.9, 0.5, 0.0), "loop": (1.0, 0.9, 0.5, 0.0)}))
    assert verdict(table.gains()) is None
    assert [gain["part"] for gain in table.gains()] == ["total"]


def test_figures_are_flat_with_ends_and_n():
    table = Table(rows_of({"base": (2.0, 0.9, 0.5, 0.1), "loop": (0.5, 0.9, 0.5, 0.8)}))
    flat = figures(table)
    assert flat["n"] == 48
    assert flat["base_error_low"] < flat["base_error"] < flat["base_error_high"]
    assert flat["loop_error_reduction"] == pytest.approx(1 - flat["loop_error"] / flat["base_error"])
    assert flat["loop_amortisation"] == pytest.approx(1)
    assert flat["base_subject_accuracy"] == 1.0
    assert all(isinstance(value, int | float) for value in flat.values())


def test_amortisation_is_undefined_where_the_loop_does_not_surely_improve():
    arms = {"base": (1.0, 0.9, 0.5, 0.0), "loop": (1.0, 0.9, 0.5, 0.0), "opd": (0.5, 0.9, 0.5, 0.0)}
    assert Table(rows_of(arms, noise=0.6)).amortisation("opd").value is None


def test_an_honest_adapter_is_not_flagged():
    arms = {"base": (2.0, 0.9, 0.9, 0.1), "teacher": (0.7, 0.9, 0.4, 0.8), "opd": (0.8, 0.89, 0.38, 0.8)}
    assert flags(Table(rows_of(arms)), ["opd"]) == []


@pytest.mark.parametrize(
    ("cheat", "what"),
    [
        ((2.1, 0.9, 0.4, 0.9), "judge"),  # the critic is delighted, the judge sees no gain
        ((0.8, 0.6, 0.4, 0.9), "alignment"),  # the dog is gone
        ((0.8, 0.9, 0.02, 0.9), "diversity"),  # one picture for every seed
    ],
)
def test_a_planted_cheat_is_flagged(cheat, what):
    arms = {"base": (2.0, 0.9, 0.9, 0.1), "teacher": (0.7, 0.9, 0.4, 0.8), "hack": cheat}
    found = flags(Table(rows_of(arms)), ["hack"])
    assert [flag["what"] for flag in found] == [what]
    assert "the reward rose" in found[0]["sentence"]


def test_no_flag_where_the_reward_did_not_rise():
    arms = {"base": (2.0, 0.9, 0.9, 0.5), "weak": (2.0, 0.5, 0.9, 0.5)}
    assert flags(Table(rows_of(arms, noise=0.5)), ["weak"]) == []


def test_a_missing_reading_is_left_out_and_pairs_stay_pairs():
    requests = [Request(prompt=f"thing {i}", target=CORNERS[3]) for i in range(3)]
    rows = [row("base", r, [off(CORNERS[3], 1.0 + i)]) for i, r in enumerate(requests)]
    rows += [row("loop", r, [off(CORNERS[3], 0.5) if i else None]) for i, r in enumerate(requests)]
    table = Table(rows)
    assert table.estimates()["loop"]["error"].n == 2
    change, _ = table.difference("error", "base", "loop")
    assert change.n == 2 and change.value == pytest.approx((2 + 3) / 2 - 0.5)


def test_sweeps_give_tau_and_smoothness_over_lanes_of_equal_noise():
    rows = []
    for i, value in enumerate((-2.0, 0.0, 2.0)):
        request = Request(prompt="a cat", target=EmotionTarget(valence=value, arousal=0.0))
        follows, against = Reading(valence=value, arousal=0), Reading(valence=-value, arousal=0)
        guards = [Reading(features=[1.0, 0.0]), Reading(features=[1.0, 0.0] if i % 2 else [0.0, 1.0])]
        rows.append(row("adapter", request, [follows, against], guards))
    found = Table(rows).estimates()["adapter"]
    assert found["valence_tau"].value == pytest.approx(0.0)  # one lane +1, the other -1
    assert found["smoothness"].value == pytest.approx(0.5)  # one lane 0, the other 1
    assert "arousal_tau" not in found
