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
