"""What words do to readings: a linear regression on the words and word pairs of prompts, with its uncertainty.

A prompt costs little to write and much to paint, so it pays to ask first what it will be read as. A model of words
alone works with any generator and any critic: it is fitted to what a log holds, and a run adds its own readings as
they come. Regression and prior are those of ridge (Bishop, Pattern Recognition and Machine Learning, 2006, section
3.3): a weight is normal around 0, those of words that the log does not know included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domain import HIGH, LOW, EmotionTarget

#: A model knows so many words and word pairs at most, the commonest; more cost the fit their cube.
_WORDS = 1000

#: Where there is no log: how far a reading is off its words (points), and how many readings a word's prior is worth.
_NOISE, _ALPHA = 0.7, 2.0


class WordModel:
    """Ridge regression of readings on the words and word pairs of prompts.

    Attributes:
        words: How many words and word pairs it knows.
        alpha: Its penalty, chosen by leaving out each text in turn.
        noise: (2,) how far it was off then, root mean square, in valence and arousal.
        errors: (N, 2) absolute errors where each text is left out of the fit.
    """

    def __init__(
        self, texts: Sequence[str] = (), readings: NDArray[np.float64] | None = None, words: int = _WORDS
    ) -> None:
        """Fit it.

        Args:
            texts: N prompts; where no word stands in two of them, nothing is known.
            readings: (N, 2) valence and arousal.
            words: Words and word pairs at most.
        """
        from sklearn.linear_model import RidgeCV

        self.words, self.alpha, self.noise = 0, _ALPHA, np.full(2, _NOISE)
        self.errors = np.zeros((0, 2))
        self._counts = _counts(min_df=2, max_features=words)
        try:
            seen = self._counts.fit_transform(texts)
        except ValueError:  # scikit-learn's word for an empty vocabulary
            return
        self.words, self._centre = seen.shape[1], np.asarray(seen.mean(0)).ravel()
        ridge: Any = RidgeCV(np.logspace(-1, 2, 10), store_cv_results=True).fit(seen, readings)
        self._ridge, self.alpha = ridge, float(ridge.alpha_)
        chosen = int(np.flatnonzero(ridge.alphas == ridge.alpha_)[0])
        self.errors = np.sqrt(ridge.cv_results_[:, :, chosen])
        self.noise = np.sqrt((self.errors**2).mean(0))
        scatter = (seen.T @ seen).toarray() - len(texts) * np.outer(self._centre, self._centre)
        self._inverse = np.linalg.inv(scatter + self.alpha * np.eye(self.words))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(N, 2) readings to be expected, within the scale."""
        return np.clip(self._ridge.predict(self._counts.transform(texts)), LOW, HIGH)

    def predict(
        self, texts: Sequence[str], seen: Sequence[str] = (), readings: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Readings to be expected after further ones of the same run.

        Args:
            texts: N prompts of one run.
            seen: M prompts of it that were read.
            readings: (M, 2) what they were read as.

        Returns:
            (N, 2) means within the scale, and (N, 2) standard deviations of the means: what more readings would lessen,
            without the noise of a single one.
        """
        every, count = [*seen, *texts], len(seen)
        mean, spread = self._prior(every)
        if count:
            gain = np.linalg.solve(spread[:count, :count] + np.eye(count), spread[:count]).T
            mean = mean + gain @ (np.asarray(readings) - mean[:count])
            spread = spread - gain @ spread[:count]
        deviation = np.sqrt(np.maximum(np.diag(spread), 0))[count:, None] * self.noise
        return np.clip(mean[count:], LOW, HIGH), deviation

    def _prior(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, 2) means and their (N, N) covariance in units of the noise's, before a run's own readings."""
        counts = _counts().fit(texts)
        shown = counts.transform(texts).toarray()
        known = self._counts.vocabulary_ if self.words else {}
        new = shown[:, [word not in known for word in counts.get_feature_names_out()]]
        # What is a run's own is in each of its prompts, as a word would be that no other run has.
        spread = (new @ new.T + 1) / self.alpha
        if not self.words:
            return np.zeros((len(texts), 2)), spread
        shown = self._counts.transform(texts).toarray()
        centred = shown - self._centre
        return self._ridge.predict(shown), spread + centred @ self._inverse @ centred.T + 1 / len(self.errors)


def expected_distance(
    mean: NDArray[np.float64], deviation: NDArray[np.float64], target: EmotionTarget
) -> NDArray[np.float64]:
    """(N,) expectations of |ΔV| + |ΔA| over the wanted axes, where the readings to be expected are normal.

    Of one axis it is the mean of a folded normal distribution (Leone, Nelson and Nottingham, Technometrics 3(4), 1961):
    what is known badly is expected farther off.

    Args:
        mean: (N, 2), from `WordModel.predict`.
        deviation: (N, 2), likewise.
        target: The wanted emotion.
    """
    from scipy.stats import norm

    total = np.zeros(len(mean))
    for axis, aim in enumerate(target.point):
        if aim is not None:
            off, spread = mean[:, axis] - aim, np.maximum(deviation[:, axis], 1e-9)
            total += 2 * spread * norm.pdf(off / spread) + off * (1 - 2 * norm.cdf(-off / spread))
    return total


def addition(neutral: str, refined: str) -> str | None:
    """What a refined prompt says after the neutral one, with what joins them; None where it says it otherwise."""
    head, text = " ".join(neutral.split()), " ".join(refined.split())
    rest = text[len(head) :]
    fits = text[: len(head)].casefold() == head.casefold() and re.match(r"[\s,;:.]", rest)
    return rest if fits and re.search(r"\w", rest) else None


def _counts(**options: Any) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+", **options)
