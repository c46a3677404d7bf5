"""The intervals: against scipy's own on the plain case, hand-computed on small ones."""

import numpy as np
import pytest
from emoloop.evals.stats import RESAMPLES, SEED, difference, estimate, sign_test
from scipy.stats import bootstrap, norm


def test_mean_with_one_request_a_prompt_is_scipys_bootstrap():
    values = list(np.random.default_rng(1).normal(2, 1, 30))
    ours = estimate([values], range(30))
    theirs = bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(SEED),
        batch=1000,
    ).confidence_interval
    assert ours.value == pytest.approx(np.mean(values))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert (ours.n, ours.clusters) == (30, 30)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        prompt = rng.normal(0, 1, 40)  # a prompt's own part, shared by its 3 requests
        values = (prompt[:, None] + rng.normal(0, 0.3, (40, 3))).ravel()
        found = estimate([list(values)], np.repeat(np.arange(40), 3).tolist())
        hits += found.low <= 0 <= found.high
    assert hits >= 50  # 95 % of 60 is 57


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(3)
    values = list(np.repeat(rng.normal(0, 1, 10), 8) + rng.normal(0, 0.1, 80))
    by_prompt = estimate([values], np.repeat(np.arange(10), 8).tolist())
    by_row = estimate([values], list(range(80)))
    assert by_prompt.high - by_prompt.low > 2 * (by_row.high - by_row.low)
    # the width is the normal theory's within a few per cent
    theory = (
        2 * norm.ppf(0.975) * np.std([np.mean(values[i * 8 : i * 8 + 8]) for i in range(10)]) / np.sqrt(10)
    )
    assert by_prompt.high - by_prompt.low == pytest.approx(theory, rel=0.1)


def test_missing_rows_leave_all_columns_and_each_prompt_weighs_the_same():
    found = estimate([[1.0, 3.0, None, 5.0], [0.0, 0.0, 9.0, 1.0]], ["a", "a", "b", "b"], lambda a, b: a - b)
    assert found.value == pytest.approx(((1 + 3) / 2 + 4) / 2)
    assert (found.n, found.clusters) == (3, 2)


def test_a_prompt_with_many_requests_counts_once_in_mean_and_interval():
    values, prompts = [1.0, 4.0, 7.0], ["a", "b", "c"]
    once = estimate([values], prompts)
    often = estimate([[1.0] * 10 + values[1:]], ["a"] * 10 + prompts[1:])
    assert (often.value, often.low, often.high) == (once.value, once.low, once.high) == (4.0, 1.0, 7.0)
    ratio = estimate([[2.0, 2.0, 6.0], [1.0, 1.0, 1.0]], ["a", "a", "b"], lambda a, b: a / b)
    assert ratio.value == pytest.approx((2 + 6) / 2)


def test_one_prompt_has_no_interval_and_nothing_has_no_value():
    alone = estimate([[1.0, 2.0]], ["a", "a"])
    assert (alone.value, alone.low, alone.high) == (1.5, None, None)
    assert estimate([[None, None]], ["a", "b"]).value is None
    assert estimate([[1.0, 2.0], [0.0, 0.0]], ["a", "b"], lambda a, b: a / b).value is None


@pytest.mark.filterwarnings("error")
def test_a_constant_has_an_interval_of_no_width():
    found = difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "abc")
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_sign_test_by_hand():
    # 5 prompts, all won: 2 * (1/2)^5
    assert sign_test([1.0] * 5, [0.0] * 5, range(5)) == pytest.approx(2 / 32)
    # a tie does not count, a missing value does not either
    assert sign_test([1.0, 1.0, 1.0, None], [0.0, 0.0, 1.0, 0.0], range(4)) == pytest.approx(0.5)
    assert sign_test([1.0], [1.0], ["a"]) is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="length"):
        estimate([[1.0]], ["a", "b"])
