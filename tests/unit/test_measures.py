"""Measures against hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
from emoloop.tools.measures import colourfulness, diversity, edge_density, grid
from PIL import Image


def flat(*colour: int, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_grey_has_no_colour_and_pure_red_what_the_formula_says() -> None:
    assert colourfulness(flat(90, 90, 90)) == 0
    # rg = 255, yb = 127.5 everywhere: no spread, only means.
    assert colourfulness(flat(255, 0, 0)) == pytest.approx(0.3 * np.hypot(255, 127.5))


def test_two_halves_add_their_spread() -> None:
    image = flat(255, 0, 0)
    image.paste((0, 255, 0), (0, 0, 8, 16))
    # rg = ±255, yb = 127.5: standard deviation 255, means 0 and 127.5.
    assert colourfulness(image) == pytest.approx(255 + 0.3 * 127.5)


def test_edges_are_counted_where_the_luminance_changes() -> None:
    assert edge_density(flat(120, 30, 200)) == 0
    image = flat(0, 0, 0)
    image.paste((255, 255, 255), (8, 0, 16, 16))
    # A vertical step is seen in the two columns beside it.
    assert edge_density(image) == pytest.approx(2 / 16)
    assert edge_density(image, threshold=1.01) == 0


def test_diversity_is_the_mean_cosine_distance() -> None:
    assert diversity([[1.0, 0.0], [0.0, 2.0]]) == pytest.approx(1)
    assert diversity([[1.0, 0.0], [3.0, 0.0]]) == pytest.approx(0)
    assert diversity([[1.0, 0.0], [-1.0, 0.0]]) == pytest.approx(2)
    assert diversity(np.eye(4)) == pytest.approx(1)
    assert diversity([[1.0, 2.0]]) == 0
    rows = np.random.default_rng(0).standard_normal((6, 5))
    pairs = [
        1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[i + 1 :]
    ]
    assert diversity(rows) == pytest.approx(np.mean(pairs))


def test_a_grid_shows_at_its_own_period_however_faint() -> None:
    rng = np.random.default_rng(0)
    # Soft shapes, as pictures have.
    noise = rng.standard_normal((96, 96, 3)).cumsum(0).cumsum(1)
    picture = 128 + 60 * (noise - noise.mean()) / np.abs(noise).max()
    y, x = np.mgrid[:96, :96]
    lines = ((x % 12 == 0) | (y % 12 == 0))[..., None]
    plain, drawn = (Image.fromarray((picture + add).clip(0, 255).astype(np.uint8)) for add in (0, 8 * lines))
    assert grid(drawn, 12) > 2 * grid(plain, 12)
    for other in (14, 16):
        assert grid(drawn, other) == pytest.approx(grid(plain, other), rel=0.35)
