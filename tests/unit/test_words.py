"""The word model against the normal equations that it stands for."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from emoloop.domain import Emotion, EmotionTarget
from emoloop.tools.words import WordModel, expected_distance
from sklearn.feature_extraction.text import CountVectorizer

#: What each word adds to valence and arousal.
EFFECTS = {"bright": (1.5, 0.5), "dark": (-1.5, 0.0), "storm": (-0.5, 1.5), "calm": (0.5, -1.5)}
NEUTRAL = [
    f"a {it}{place}" for it in ("dog", "cat", "boat", "owl", "tent") for place in ("", " in town", " in snow")
]
ADDED = ("", "bright", "dark", "storm", "calm", "bright calm", "dark storm")
TEXTS = [f"{neutral} {added}".strip() for neutral, added in product(NEUTRAL, ADDED)]


def law(text: str) -> tuple[float, float]:
    valence, arousal = np.sum(
        [(0.0, 0.0), *(EFFECTS[word] for word in text.split() if word in EFFECTS)], axis=0
    )
    return float(valence), float(arousal)


READINGS = np.array([law(text) for text in TEXTS]) + np.random.default_rng(0).normal(0, 0.3, (len(TEXTS), 2))


def columns(texts: list[str], vocabulary: list[str]) -> np.ndarray:
    counts = CountVectorizer(
        ngram_range=(1, 2), binary=True, token_pattern=r"\w+", vocabulary=vocabulary, lowercase=True
    )
    return counts.transform(texts).toarray().astype(float)


def test_it_learns_what_words_add() -> None:
    model = WordModel(TEXTS, np.array([law(text) for text in TEXTS]))
    assert model.errors.mean(0).max() < 0.1
    # Words that never met in one prompt.
    assert model(["a dog in town, bright storm"])[0] == pytest.approx(law("bright storm"), abs=0.35)
    assert abs(model(["a dog " + "bright " * 9 + "calm storm dark"])).max() <= 3


def test_it_is_ridge_regression_with_the_penalty_that_leaves_out_best() -> None:
    model = WordModel(TEXTS, READINGS)
    shown = columns(TEXTS, sorted(_vocabulary(2)))
    assert model.words == shown.shape[1]

    def fit(alpha: float, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y = shown[keep], READINGS[keep]
        centred = x - x.mean(0)
        weights = np.linalg.solve(
            centred.T @ centred + alpha * np.eye(x.shape[1]), centred.T @ (y - y.mean(0))
        )
        return weights, x.mean(0), y.mean(0)

    def left_out(alpha: float) -> np.ndarray:
        errors = []
        for place in range(len(TEXTS)):
            weights, x, y = fit(alpha, np.arange(len(TEXTS)) != place)
            errors.append(abs(READINGS[place] - y - (shown[place] - x) @ weights))
        return np.array(errors)

    weights, x, y = fit(model.alpha, np.full(len(TEXTS), True))
    assert model(TEXTS) == pytest.approx(np.clip(y + (shown - x) @ weights, -3, 3), abs=1e-6)
    assert model.errors == pytest.approx(left_out(model.alpha), abs=1e-6)
    assert model.noise == pytest.approx(np.sqrt((model.errors**2).mean(0)))
    for alpha in (model.alpha * 10 ** (1 / 3), model.alpha / 10 ** (1 / 3)):
        assert (left_out(alpha) ** 2).mean() >= (model.errors**2).mean() - 1e-9


@pytest.mark.parametrize("log", [True, False])
def test_a_runs_readings_condition_it_as_the_normal_equations_do(log: bool) -> None:
    """With all words of the run as columns and a normal prior on each weight, the posterior is known in closed form."""
    model = WordModel(TEXTS, READINGS) if log else WordModel()
    seen = ["a zebra in town", "a zebra in town, bright", "a zebra in town, dark glow"]
    asked = ["a zebra in town, bright glow", "a zebra in town, storm", "an ice sheet"]
    readings = np.array([(0.4, 0.1), (1.9, 0.8), (-1.4, -0.3)])
    known = sorted(_vocabulary(2)) if log else []
    everything = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").fit([*seen, *asked]).vocabulary_
    new = sorted(set(everything) - set(known))
    # Columns: known words, new words, what is the run's own, and the constant that the log knows to 1 / N.
    prior = np.eye(len(known) + len(new) + 2) / model.alpha
    prior[-1, -1] = 0.0
    mean = np.zeros((len(prior), 2))
    centre = np.zeros(len(known))
    if log:
        shown = columns(TEXTS, known)
        centre, prior[-1, -1] = shown.mean(0), 1 / len(TEXTS)
        centred = shown - centre
        inverse = np.linalg.inv(centred.T @ centred + model.alpha * np.eye(len(known)))
        prior[: len(known), : len(known)] = inverse
        mean[: len(known)] = inverse @ centred.T @ (READINGS - READINGS.mean(0))
        mean[-1] = READINGS.mean(0)

    def features(texts: list[str]) -> np.ndarray:
        parts = [columns(texts, known) - centre] if log else []
        return np.hstack([*parts, columns(texts, new), np.ones((len(texts), 2))])

    def check(seen: list[str], readings: np.ndarray) -> np.ndarray:
        x, wanted = features(seen), features(asked)
        # With a pseudo-inverse, since the constant has no variance where there is no log.
        covariance = np.linalg.pinv(np.linalg.pinv(prior) + x.T @ x) if log else None
        if covariance is None:
            x, wanted, inner = x[:, :-1], wanted[:, :-1], prior[:-1, :-1]
            covariance = np.linalg.inv(np.linalg.inv(inner) + x.T @ x)
            weights = covariance @ x.T @ readings
        else:
            weights = mean + covariance @ x.T @ (readings - x @ mean)
        found, deviation = model.predict(asked, seen, readings)
        assert found == pytest.approx(np.clip(wanted @ weights, -3, 3), abs=1e-6)
        expected = np.sqrt(np.diag(wanted @ covariance @ wanted.T))[:, None] * model.noise
        assert deviation == pytest.approx(expected, abs=1e-6)
        return deviation

    assert (check(seen, readings) < check([], np.zeros((0, 2)))).all()


def test_where_nothing_is_known_the_scales_middle_is_expected() -> None:
    for model in (WordModel(), WordModel(["one"], np.array([[1.0, 2.0]]))):
        mean, deviation = model.predict(["a dog", "a dog in snow"])
        assert (mean == 0).all() and not model.words
        # The longer prompt has more words that nobody knows.
        assert (deviation[1] > deviation[0]).all()


def _vocabulary(least: int) -> list[str]:
    return list(
        CountVectorizer(ngram_range=(1, 2), min_df=least, token_pattern=r"\w+").fit(TEXTS).vocabulary_
    )


def test_what_is_known_badly_is_expected_farther_off() -> None:
    mean, deviation = (
        np.array([[0.5, -1.0], [0.5, -1.0], [2.0, 1.0]]),
        np.array([[0.0, 0.0], [0.8, 1.5], [0.3, 0.1]]),
    )
    draws = np.random.default_rng(1).normal(mean, deviation, (200_000, 3, 2))
    both = EmotionTarget(valence=1.0, arousal=-1.0)
    assert expected_distance(mean, deviation, both) == pytest.approx(
        abs(draws - (1.0, -1.0)).sum(-1).mean(0), abs=0.01
    )
    assert expected_distance(mean, deviation, both)[0] == pytest.approx(0.5)
    one = EmotionTarget(arousal=0.5)
    assert expected_distance(mean, deviation, one) == pytest.approx(
        abs(draws[..., 1] - 0.5).mean(0), abs=0.01
    )
    # A category alone aims at its prototype.
    awe = EmotionTarget(category=Emotion.AWE)
    assert (expected_distance(mean, deviation, awe) > 0).all()
