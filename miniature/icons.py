"""Icons: takes the used ones out of an Iconify package and rasterises them into a small sprite sheet.

    npm pack @iconify-json/fluent-emoji-flat && tar xzf *.tgz
    python -m emoloop.miniature.icons package/icons.json fluent

The sheet (`icons/<style>.npz`, RGBA uint8 at the three sizes that the renderer draws) is what the package
ships, so that nothing but recipes needs an SVG renderer.
"""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parent / "icons"

#: Side of a subject, a near companion and a far companion, in pixels: 4, 3 and 2 image tokens.
SUBJECT, NEAR, FAR = 48, 36, 24


def rasterise(iconify_json: Path, icons: dict[str, str], size: int) -> dict[str, NDArray[np.uint8]]:
    """Draw icons from an Iconify collection.

    Args:
        iconify_json: The collection's `icons.json`.
        icons: Our name → the collection's name.
        size: Side in pixels.

    Returns:
        Our name → RGBA array of shape (size, size, 4).
    """
    import resvg_py  # pyright: ignore[reportMissingImports]

    collection = json.loads(iconify_json.read_text())
    sprites = {}
    for name, theirs in icons.items():
        theirs = collection.get("aliases", {}).get(theirs, {}).get("parent", theirs)
        icon = collection["icons"][theirs]
        width = icon.get("width", collection.get("width", 16))
        height = icon.get("height", collection.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size * 4, height=size * 4))
        image = Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        sprites[name] = np.asarray(image)
    return sprites


@cache
def sprites(style: str = "fluent") -> dict[tuple[str, int], NDArray[np.uint8]]:
    """The shipped sprites of a style: (name, size) → RGBA array of shape (size, size, 4)."""
    with np.load(FOLDER / f"{style}.npz") as sheet:
        return {(key.rsplit("@", 1)[0], int(key.rsplit("@", 1)[1])): sheet[key] for key in sheet.files}


def main() -> None:
    """Build one style's sheet from an Iconify collection."""
    from .world import COMPANIONS, SUBJECTS

    source, style = Path(sys.argv[1]), sys.argv[2]
    sheet = {}
    for icons, sizes in (
        ({name: thing.icon for name, thing in SUBJECTS.items()}, (SUBJECT,)),
        ({name: thing.icon for name, thing in COMPANIONS.items()}, (NEAR, FAR)),
    ):
        for size in sizes:
            sheet |= {f"{name}@{size}": sprite for name, sprite in rasterise(source, icons, size).items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{style}.npz", **sheet)
    print(f"{len(sheet)} sprites in {FOLDER / f'{style}.npz'}")


if __name__ == "__main__":
    main()
