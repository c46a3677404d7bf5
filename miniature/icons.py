"""The icons that the renderer draws, as RGBA sprites from a shipped sheet (`icons/<style>.npz`).

`python -m emoloop.miniature.build icons` makes a sheet from an Iconify package; only that needs an SVG renderer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "icons"

#: Side of a subject, a near companion and a far companion, in pixels: 4, 3 and 2 image tokens.
SUBJECT, NEAR, FAR = 48, 36, 24


@cache
def sprites(style: str = "fluent") -> dict[tuple[str, int], NDArray[np.uint8]]:
    """The shipped sprites of a style: (name, size) → RGBA array of shape (size, size, 4)."""
    with np.load(FOLDER / f"{style}.npz") as sheet:
        return {(key.rsplit("@", 1)[0], int(key.rsplit("@", 1)[1])): sheet[key] for key in sheet.files}
