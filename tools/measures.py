"""Measures of pictures that need no model: what training watches and evaluation reports.

All take RGB images and return plain floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image


def pixels(image: Image) -> np.ndarray:
    """(H, W, 3) float64 in [0, 255]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def colourfulness(image: Image) -> float:
    """Hasler & Süsstrunk (2003), "Measuring colourfulness in natural images": 0 is grey, above 80 is vivid.

    With rg = R - G and yb = (R + G) / 2 - B, it is √(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²).
    """
    red, green, blue = np.moveaxis(pixels(image), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def edge_density(image: Image, threshold: float = 0.1) -> float:
    """Share of pixels, in [0, 1], whose luminance gradient (Sobel) exceeds `threshold` of its largest value.

    A generator that hacks its reward tends to wash out detail or to fill the picture with texture; both show
    here.
    """
    from scipy.ndimage import sobel

    luminance = pixels(image) @ np.array([0.299, 0.587, 0.114]) / 255
    # A step from 0 to 1 gives 4 on an axis-parallel edge.
    gradient = np.hypot(sobel(luminance, 0, mode="nearest"), sobel(luminance, 1, mode="nearest")) / 4
    return float((gradient > threshold).mean())


def grid(image: Image, period: int) -> float:
    """Energy at the frequencies of a grid over that of its neighbours: about 1 for a picture that has none.

    The luminance, under a Hann window, is Fourier transformed. A pattern that repeats after `period` pixels in both
    directions has all its energy at multiples of 1 / `period`; each of them is compared with the eight frequencies
    around it, and the geometric mean of the ratios taken.

    Args:
        image: At least 4 periods wide and high, or the frequencies lie too near.
        period: In pixels.
    """
    luminance = pixels(image) @ np.array([0.299, 0.587, 0.114]) / 255
    height, width = luminance.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    # The floor is what rounding to 256 levels leaves.
    power = np.square(np.abs(np.fft.fft2((luminance - luminance.mean()) * window))) + 1e-6
    apart = max(2, min(height, width) // period // 2 - 1)
    places = np.arange(period) - (period - 1) // 2
    rows, columns = (np.round(places * length / period).astype(int) for length in (height, width))
    y, x = (it.ravel() for it in np.meshgrid(rows, columns, indexing="ij"))
    y, x = y[(here := (y != 0) | (x != 0))], x[here]

    def at(down: int, right: int) -> np.ndarray:
        return np.log(power[(y + down) % height, (x + right) % width])

    around = [(down, right) for down in (-apart, 0, apart) for right in (-apart, 0, apart) if down or right]
    return float(np.exp(np.mean(at(0, 0) - np.mean([at(*way) for way in around], axis=0))))


def diversity(features: Sequence[Sequence[float]] | np.ndarray) -> float:
    """Mean cosine distance between the features of different images, in [0, 2]; 0 for fewer than two.

    Args:
        features: (N, D), a row per image of one prompt.
    """
    rows = np.asarray(features, dtype=np.float64)
    if len(rows) < 2:
        return 0.0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1)
    similarity = unit @ unit.T
    n = len(rows)
    return float(1 - (similarity.sum() - np.trace(similarity)) / (n * (n - 1)))
