"""Metrics against scipy, torchmetrics and sums done by hand."""

import numpy as np
import pytest
import torch
from emoloop.domain import Emotion, EmotionTarget
from emoloop.evals import metrics
from emoloop.evals.metrics import bias_and_spread
from emoloop.evals.records import Reading
from emoloop.evals.suites import Request
from torchmetrics.functional import kendall_rank_corrcoef, mean_absolute_error, pairwise_cosine_similarity


def test_errors_by_hand_and_over_wanted_axes_only():
    reading = Reading(valence=1.0, arousal=-0.5)
    assert metrics.axis_errors(reading, EmotionTarget(valence=2, arousal=-1)) == (1.0, 0.5)
    assert metrics.error(reading, EmotionTarget(valence=2, arousal=-1)) == 1.5
    assert metrics.error(reading, EmotionTarget(arousal=1)) == 1.5
    assert metrics.axis_errors(reading, EmotionTarget(arousal=1)) == (None, 1.5)
    # a category alone stands for its prototype, awe (1.2, 1.5)
    assert metrics.error(reading, EmotionTarget(category=Emotion.AWE)) == pytest.approx(0.2 + 2.0)


def test_an_unread_axis_is_missing_not_zero():
    assert metrics.error(Reading(valence=1.0), EmotionTarget(valence=1, arousal=1)) is None
    assert metrics.error(Reading(valence=1.0), EmotionTarget(valence=2)) == 1.0
    assert metrics.mean([None, 1.0, 3.0]) == 2.0
    assert metrics.mean([None]) is None


def test_mean_errors_equal_torchmetrics():
    rng = np.random.default_rng(0)
    wanted, read = rng.uniform(-3, 3, (2, 50, 2))
    ours = [
        metrics.error(Reading(valence=r[0], arousal=r[1]), EmotionTarget(valence=w[0], arousal=w[1]))
        for w, r in zip(wanted, read, strict=True)
    ]
    theirs = sum(mean_absolute_error(torch.tensor(read[:, i]), torch.tensor(wanted[:, i])) for i in (0, 1))
    assert metrics.mean(ours) == pytest.approx(float(theirs))


def test_emotion_accuracy():
    want = EmotionTarget(category=Emotion.FEAR)
    assert metrics.emotion_right(Reading(category=Emotion.FEAR), want) == 1.0
    assert metrics.emotion_right(Reading(category=Emotion.AWE), want) == 0.0
    assert metrics.emotion_right(Reading(), want) is None
    assert metrics.emotion_right(Reading(category=Emotion.AWE), EmotionTarget(valence=1)) is None


@pytest.mark.parametrize("ties", [False, True])
def test_tau_equals_torchmetrics(ties):
    rng = np.random.default_rng(4)
    wanted = np.linspace(-3, 3, 9)
    read = wanted + rng.normal(0, 1.5, 9)
    if ties:
        read = np.round(read)
    theirs = kendall_rank_corrcoef(torch.tensor(read), torch.tensor(wanted), variant="b")
    assert metrics.rank_tau(list(wanted), list(read)) == pytest.approx(float(theirs), abs=1e-6)


def test_tau_by_hand():
    assert metrics.rank_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)  # 2 of 3 pairs agree: (2 - 1) / 3
    assert metrics.rank_tau([1, 2, 3], [5, 5, 5]) == 0.0  # a constant image follows nothing
    assert metrics.rank_tau([1, 2, 3, 4], [1, None, 2, 3]) == 1.0
    assert metrics.rank_tau([1, 2, 3], [1, None, 2]) is None


def test_feature_distance_equals_torchmetrics():
    a, b = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = 1 - float(pairwise_cosine_similarity(a, b))
    assert metrics.feature_distance(a[0].tolist(), b[0].tolist()) == pytest.approx(theirs)
    assert metrics.feature_distance([0, 0], [0, 0]) == 0.0
    assert metrics.feature_distance([0, 0], [1, 0]) == 1.0


def test_smoothness_by_hand():
    assert metrics.smoothness([[1, 0], [0, 1], [0, 1]]) == pytest.approx(0.5)
    assert metrics.smoothness([[1, 0]] * 4) == 0.0
    assert metrics.smoothness([[1, 0], None, [0, 1]]) is None
    assert metrics.smoothness([[0.0], [3.0], [4.0]], lambda a, b: abs(a[0] - b[0])) == 2.0


def test_amortisation_by_hand():
    assert float(metrics.amortisation(np.array(2.0), np.array(1.4), np.array(1.0))) == pytest.approx(0.6)


def test_sweeps_are_found_in_a_grid_and_not_in_four_corners():
    values = (-1.5, 0.0, 1.5)
    grid = [
        Request(prompt="a cat", target=EmotionTarget(valence=v, arousal=a)) for v in values for a in values
    ]
    found = metrics.sweeps(grid)
    assert [axis for axis, _ in found].count("valence") == 3
    assert [axis for axis, _ in found].count("arousal") == 3
    axis, places = found[0]
    assert [getattr(grid[p].target, axis) for p in places] == list(values)
    corners = [
        Request(prompt="a cat", target=EmotionTarget(valence=v, arousal=a)) for v in (-2, 2) for a in (-2, 2)
    ]
    assert metrics.sweeps(corners) == []


def test_sweeps_do_not_mix_prompts_or_categories():
    requests = [
        Request(prompt=f"thing {i}", target=EmotionTarget(valence=float(i), arousal=0)) for i in range(3)
    ] + [Request(prompt="thing", target=EmotionTarget(valence=float(i), arousal=0)) for i in range(3)]
    ((axis, places),) = metrics.sweeps(requests)
    assert axis == "valence" and places == [3, 4, 5]


def test_bias_is_what_the_mean_misses_and_spread_what_luck_adds():
    target = EmotionTarget(valence=2, arousal=-1)
    readings = [Reading(valence=1, arousal=-1), Reading(valence=2, arousal=0), Reading(valence=0, arousal=1)]
    bias, spread = bias_and_spread(readings, target)
    assert bias == pytest.approx(1 + 1) and spread == pytest.approx((0 + 1 + 1 + 0 + 1 + 1) / 3)
    # Misses on both sides are no bias.
    assert bias_and_spread([Reading(valence=1), Reading(valence=3)], EmotionTarget(valence=2)) == (0.0, 1.0)
    assert bias_and_spread(readings[:1], target) == (None, None)
    assert bias_and_spread([Reading(valence=1), Reading(arousal=1)], target) == (None, None)
