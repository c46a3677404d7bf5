"""Rows become figures: by hand on small cases, and planted effects are found while honest arms pass."""

import pytest
from emoloop.domain import Candidate, Critique, EmotionTarget, Round
from emoloop.evals.analysis import Table, figures, flags, of_request, verdict, worth
from emoloop.evals.records import Cost, Reading, Row
from emoloop.evals.suites import Request, Suite
from eval_rows import CORNERS, off, row, rows_of, run_of


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


def test_diversity_is_held_against_the_base_and_not_against_a_teacher_that_has_collapsed():
    arms = {"base": (2.0, 0.9, 0.9, 0.1), "teacher": (0.7, 0.9, 0.02, 0.8), "hack": (0.8, 0.9, 0.02, 0.9)}
    assert [flag["what"] for flag in flags(Table(rows_of(arms)), ["hack"])] == ["diversity"]


def test_what_the_weights_add_to_each_control():
    arms = {
        "base": 2.0,
        "lookup": 1.1,
        "planner": 1.0,
        "tokens": 1.2,
        "text": 1.3,
        "whole": 0.8,
        "direct": 0.9,
    }
    table = Table(rows_of({arm: (miss, 0.9, 0.5, 0.0) for arm, miss in arms.items()}))
    found = worth(table, "whole")
    assert set(found) == {"whole_minus_lookup", "whole_minus_planner", "whole_minus_tokens", "direct_gain"}
    for name, wanted in (("lookup", 0.3), ("planner", 0.2), ("tokens", 0.4)):
        assert found[f"whole_minus_{name}"].value == pytest.approx(wanted, abs=0.1)
    assert found["direct_gain"].value == pytest.approx(0.4, abs=0.1) and found["direct_gain"].low > 0
    assert set(worth(table, None)) == {"direct_gain"}
    flat = figures(table, found)
    assert flat["whole_minus_planner_low"] < flat["whole_minus_planner"] < flat["whole_minus_planner_high"]


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


AIM = EmotionTarget(valence=2, arousal=-1)


def walk(errors, perceived, arm="loop", prompt="a dog", target=AIM, delivered=None, budget=24):
    """A run of pictures that miss by `errors` for the judge and by `perceived` for the critic."""
    request = Request(prompt=prompt, target=target)
    made = [
        Candidate(
            round=place // 2,
            index=place % 2,
            prompt=prompt,
            seed=place,
            sha256=f"{arm}{prompt}{place}",
            critique=Critique(valence=target.valence - seen, arousal=target.arousal, alignment=1),
            reward=1 - seen,
        )
        for place, seen in enumerate(perceived)
    ]
    rounds = [Round(prompt=prompt, candidates=made[start : start + 2]) for start in range(0, len(made), 2)]
    best = made[delivered] if delivered is not None else max(made, key=lambda one: one.reward)
    found = Row(arm, request, run_of(request, rounds, arm), [best], Cost(len(made), len(made)))
    misses = {one.sha256: error for one, error in zip(made, errors, strict=True)}
    found.readings = [off(target, misses[best.sha256])]
    found.led = [off(target, misses[one.sha256]) for _, one in found.leaders]
    found.guard = [None] * len(found.siblings)
    return found


def test_error_against_images_follows_the_critics_choice_by_the_judge():
    # The critic's favourites are the 1st, 2nd and 5th picture; the judge thinks the last is worse than the 2nd.
    found = walk([2.0, 0.4, 0.1, 3.0, 0.9, 0.2], [1.5, 0.6, 0.6, 1.0, 0.3, 0.7])
    assert [count for count, _ in found.leaders] == [1, 2, 5]
    values = of_request(found, budget=24)
    at = {images: values[f"error_at_{images}"] for images in (1, 2, 4, 8, 12, 24)}
    assert at == pytest.approx({1: 2.0, 2: 0.4, 4: 0.4, 8: 0.9, 12: 0.9, 24: 0.9})
    assert values["error"] == at[24]
    assert values["images_to_target"] == 2
    assert "error_at_8" not in of_request(found, budget=6)


def test_what_is_delivered_may_be_another_than_the_favourite():
    found = walk([2.0, 0.4, 0.1], [1.5, 0.3, 0.6], delivered=2)
    assert [(count, one.seed) for count, one in found.leaders] == [(1, 0), (2, 1), (3, 2)]
    assert of_request(found)["error_at_24"] == pytest.approx(0.1)


def test_images_to_target_counts_the_budget_where_it_is_never_reached():
    rows = [walk([0.3], [0.1]), walk([2.0, 2.0], [0.5, 0.2], prompt="a cat")]
    suite = suite_of({"place": ["a dog", "a cat"]})
    found = Table(rows, suite=suite).estimates()["loop"]["images_to_target"]
    assert found.value == pytest.approx((1 + 24) / 2)
    rows[1].led[0] = None  # nobody could read the favourite: unknown, and not "never"
    assert Table(rows, suite=suite).estimates()["loop"]["images_to_target"].value == 1


def test_a_guard_says_how_far_it_is_off_and_how_far_from_the_judge():
    found = walk([0.9, 1.0], [0.5, 0.2], prompt="a dog")
    assert {of_request(found)[key] for key in ("guard_error", "dispute")} == {None}
    aim, judge = found.request.target, found.readings[0]
    seen = Reading(valence=aim.valence - 0.5, arousal=aim.arousal)
    place = [one.sha256 for one in found.siblings].index(found.handed_over[0].sha256)
    found.guard[place] = seen
    apart = abs(seen.valence - judge.valence) + abs(seen.arousal - judge.arousal)
    values = of_request(found)
    assert (values["guard_error"], values["dispute"]) == (pytest.approx(0.5), pytest.approx(apart))
    found.guard[place] = Reading(alignment=1.0)
    assert {of_request(found)[key] for key in ("guard_error", "dispute")} == {None}


def test_the_bias_of_an_estimate_is_the_judges_error_minus_the_critics():
    rows = [walk([0.9, 1.0], [0.5, 0.2]), walk([0.1], [0.3], prompt="a cat")]
    assert of_request(rows[0])["estimate_bias"] == pytest.approx(1.0 - 0.2)
    assert of_request(rows[1])["estimate_bias"] == pytest.approx(0.1 - 0.3)
    assert Table(rows).estimates()["loop"]["estimate_bias"].value == pytest.approx((0.8 - 0.2) / 2)


def test_feedback_is_measured_against_as_many_different_rewrites_at_equal_images():
    rows = []
    for number in range(6):
        prompt = f"thing {number}"
        rows.append(walk([2.0, 1.0 + 0.1 * number], [1.0, 0.5], "diverse_best_of_n", prompt))
        rows.append(walk([2.0, 0.6], [1.0, 0.5], "loop", prompt))
        rows.append(walk([2.0], [1.0], "rewrite_best_of_n", prompt))
    flat = figures(Table(rows))
    assert flat["gain_feedback"] == pytest.approx(1.25 - 0.6)
    assert flat["gain_feedback_low"] > 0
    assert flat["gain_feedback_at_1"] == pytest.approx(0)
    assert flat["gain_feedback_at_8_low"] == pytest.approx(flat["gain_feedback_low"])
    assert flat["gain_variety"] == pytest.approx(2.0 - 1.25)


def suite_of(prompts):
    block = {"prompts": prompts, "targets": [AIM.model_dump()]}
    return Suite.model_validate({"name": "small", "version": 1, "arms": ["loop"], "blocks": [block]})


def test_kinds_and_paraphrases():
    suite = suite_of({"place": ["a dog"], "paraphrase": ["there is a dog"], "bare": ["a cat"]})
    rows = [
        walk([error], [0.1], prompt=prompt)
        for prompt, error in zip(suite.kinds, (0.5, 0.75, 2.0), strict=True)
    ]
    table = Table(rows, suite=suite)
    assert {kind: arms["loop"].value for kind, arms in table.kinds().items()} == pytest.approx(
        {"place": 0.5, "paraphrase": 0.75, "bare": 2.0}
    )
    assert figures(table)["loop_paraphrase_gap"] == pytest.approx(0.25)


def test_a_reader_without_a_picture_has_an_error_and_costs_nothing():
    rows = [
        Row("constant", Request(prompt="a dog", target=target), readings=[Reading(valence=0, arousal=0)])
        for target in CORNERS
    ]
    found = Table(rows).estimates()["constant"]
    assert found["error"].value == pytest.approx(3.0)
    assert found["images"].value == found["lvlm_calls"].value == 0
    assert "error_at_1" not in found


def test_content_comes_from_the_guard_and_a_prompt_without_any_does_not_count():
    request = Request(prompt="a dog", target=AIM)
    rows = [
        row(
            "base",
            request,
            [Reading(valence=2, arousal=-1)] * 2,
            [Reading(kept=True, unasked=1), Reading(kept=False)],
        )
    ]
    rows += [
        row(
            "base",
            Request(prompt="a cat", target=AIM),
            [Reading(valence=2, arousal=-1)],
            [Reading(unasked=2)],
        )
    ]
    found = Table(rows).estimates()["base"]
    assert (found["content_kept"].value, found["content_kept"].n) == (0.5, 1)
    assert found["drift"].value == pytest.approx(1.5)


def test_only_declared_sweeps_count_where_a_suite_declares_some():
    sweep = {"axis": "valence", "values": [-2, 0, 2], "other": 0}
    block = {"prompts": ["a cat"], "sweeps": [sweep], "grid": {"valence": [-1, 0, 1], "arousal": [-1, 0, 1]}}
    suite = Suite.model_validate({"name": "small", "version": 1, "arms": ["base"], "blocks": [block]})
    rows = [
        row("base", request, [Reading(valence=request.target.valence, arousal=0)])
        for request in suite.requests
    ]
    declared, found = Table(rows, suite=suite), Table(rows)
    assert [len(it["sweep"].split()) for it in declared.sweeps("base")["valence_tau"]] == [1 + 3]
    assert len(found.sweeps("base")["valence_tau"]) == 3
    assert "arousal_tau" not in declared.estimates()["base"]
