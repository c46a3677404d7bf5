"""Pictures for the docs: 64 uncurated samples, and a sweep over valence and arousal.

python -m emoloop.miniature.sheets docs/miniature
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..tools.images.base import Generator, ImageRequest
from ..tools.images.load import load_generator
from . import episodes, law, world


def sample_captions(count: int = 64) -> list[tuple[str, world.Scene]]:
    """Captions of held-out compositions that name everything; caption i is drawn with seed i."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng([seed, 64])
        scene = world.sample_scene(rng, world.FOLDS["test"])
        everything = world.Named(True, True, True, True, True, (True,) * len(scene.companions), True)
        found.append((world.caption(rng, scene, everything), scene))
    return found


def _grid(pictures: list[Image.Image], columns: int, titles: list[str] | None = None) -> Image.Image:
    step_x, step_y = 2 * world.SIZE + 4, 2 * world.SIZE + (16 if titles else 4)
    sheet = Image.new("RGB", (columns * step_x, -(-len(pictures) // columns) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * step_x, i // columns * step_y
        sheet.paste(
            picture.resize((2 * world.SIZE, 2 * world.SIZE), Image.Resampling.LANCZOS), (x + 2, y + 2)
        )
        if titles:
            draw.text((x + 4, y + 2 * world.SIZE + 2), titles[i], fill="black")
    return sheet


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


async def _draw(generator: Generator, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    requests = [ImageRequest(prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
    return [made.image for made in await generator.generate(requests)]


async def draw_sheets() -> tuple[Image.Image, Image.Image]:
    """The sample sheet and the sweep sheet."""
    generator = load_generator("miniature")
    samples = sample_captions()
    pictures = await _draw(generator, [c for c, _ in samples], list(range(len(samples))))
    sheet = _grid(pictures, 8)
    sweep = sweep_captions("a dog by the sea")
    pictures = await _draw(generator, [c for c, _ in sweep], [0] * len(sweep))
    await generator.aclose()
    return sheet, _grid(pictures, 5, [t for _, t in sweep])


def main(out: Path) -> None:
    """Write `samples.png`, `samples.txt` and `sweep.png`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.txt").write_text("".join(f"{i:2d}  {c}\n" for i, (c, _) in enumerate(sample_captions())))
    samples, sweep = asyncio.run(draw_sheets())
    samples.save(out / "samples.png", optimize=True)
    sweep.save(out / "sweep.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
