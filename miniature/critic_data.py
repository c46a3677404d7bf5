"""Labelled pictures of the generator's kind, for the critic's training (`emoloop train critic`).

A rendered scene goes through the generator's codec, is noised to a time t and denoised under its full caption: it then
looks as what the generator paints, and its scene is still known. The label is the law on that scene and the new pixels;
beside it lies the render itself, in the new picture's colours, as its clean counterpart.
From t = .5 on the generator begins to leave things out, so pictures on which the guard, a recogniser of its own, reads
a content that feels otherwise than the scene's are dropped there. The judge takes no part. Some stay plain renders.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..files import write_atomic
from ..settings import GeneratorSettings
from ..tools.images.base import ImageRequest
from ..tools.images.diffusers import DiffusersGenerator
from ..tools.images.load import load_generator
from . import law, world
from .episodes import critique_of
from .judge import Guard, LawJudge

#: Pictures in one pass of the generator.
BATCH = 16
#: Times that pictures are noised to, and the share of plain renders.
TIMES, PLAIN = (0.4, 0.95), 0.15
#: Largest |ΔV| + |ΔA| between the scene's content and what the guard reads, and the time from which it is asked.
LOST, DOUBTFUL = 0.6, 0.5
#: Compositions that are watched: neither those of the critic's training nor the test's.
WATCHED = (4, 5, 6)


@torch.inference_mode()
def repaint(
    generator: DiffusersGenerator, pictures: list[Image.Image], captions: list[str], t: float, seed: int
) -> list[Image.Image]:
    """Pictures noised to `t` and denoised under their captions, as the generator paints by default.

    Args:
        generator: The miniature's.
        pictures: RGB, 96 × 96.
        captions: One for each.
        t: In (0, 1]; 1 keeps nothing of the picture.
        seed: Of the noise.

    Returns:
        As many, of the same size.
    """
    family, process, count = generator.family, generator.family.process(), len(pictures)
    clean = family.encode_images(pictures)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    told = family.encode(captions + [""] * count)
    schedule = process.schedule(generator.steps, family.image_tokens(family.latent_shape(*pictures[0].size)))
    times = torch.cat([torch.tensor([t]), schedule[schedule < t]])
    x = process.add_noise(clean, noise, times[:1])
    for now, then in pairwise(times):
        both = family.denoise(
            family.module, torch.cat([x, x]), now.expand(2 * count), told, generator.guidance
        )
        with_, without = both.chunk(2)
        x = process.step(x, without + generator.guidance * (with_ - without), now, then)
    return family.decode(x)


def recoloured(render: NDArray[np.uint8], like: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A render with the mean HSV value and saturation of another picture, so that the law reads its colour alike.

    Args:
        render: RGB, (height, width, 3).
        like: The other one.
    """
    brightness, saturation = law.brightness_saturation(like)
    x = render.astype(np.float32) / 255
    for _ in range(4):
        high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
        vivid = float(((high - low) / np.maximum(high, 1e-6)).mean())
        x = high - (high - x) * np.clip(saturation / max(vivid, 1e-3), 0.5, 2)
        bright = float(np.clip(x, 0, 1).max(-1).mean())
        x = np.clip(np.clip(x, 0, 1) * np.clip(brightness / max(bright, 1e-3), 0.5, 2), 0, 1)
    return (x * 255).round().astype(np.uint8)


@cache
def _models() -> tuple[DiffusersGenerator, Guard]:
    torch.set_num_threads(1)
    generator = load_generator("miniature", GeneratorSettings(device="cpu"))
    assert isinstance(generator, DiffusersGenerator)
    return generator, Guard()


def _batch(out: Path, split: str, start: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Make and save some pictures; the rows of those that are kept. A function of its arguments alone."""
    generator, guard = _models()
    rng = np.random.default_rng([seed, len(split), start])
    folds = WATCHED if split == "held_out" else world.FOLDS["critic"]
    scenes = [world.sample_scene(rng, folds) for _ in range(count)]
    renders = [world.render(scene) for scene in scenes]
    pictures = [Image.fromarray(render) for render in renders]
    t = 0.0 if rng.random() < PLAIN else float(rng.uniform(*TIMES))
    if t:
        captions = [world.caption(rng, scene, world.everything(scene)) for scene in scenes]
        pictures = repaint(generator, pictures, captions, t, int(rng.integers(2**31)))
    pixels, rows = [np.asarray(one) for one in pictures], []
    for number, (scene, read) in enumerate(zip(scenes, guard.read(pictures), strict=True)):
        example = critique_of(
            np.random.default_rng([seed, len(split), start + number, 1]), scene, pixels[number]
        )
        gap = np.subtract(law.content_affect(scene), law.content_affect(read.scene))
        if t > DOUBTFUL and np.abs(gap).sum() > LOST:
            continue
        name = f"pictures/{split}-{start + number:05d}.png"
        pictures[number].save(out / name)
        clean = {"clean": name.replace(".png", "-clean.png")} if t else {}
        for place in clean.values():
            Image.fromarray(recoloured(renders[number], pixels[number])).save(out / place)
        prompt, target = (line.partition(": ")[2] for line in example.task.splitlines())
        valence, arousal = law.affect(scene, pixels[number])
        answer = json.loads(example.answer)
        rows.append({
            "image": name, **clean, "valence": round(valence, 3), "arousal": round(arousal, 3), "prompt": prompt,
            **{f"target_{axis}": float(value) for axis, value in re.findall(r"(valence|arousal) (\S+)", target)},
            **{key: answer[key] for key in ("category", "analysis", "alignment", "suggestion")},
            "split": split, "t": round(t, 3),
        })  # fmt: skip
    return rows


def build_critic_data(
    out: Path, count: int = 3200, held_out: int = 400, seed: int = 0, processes: int = 2
) -> None:
    """Write a data folder: pictures and `metadata.jsonl` with the column `split`.

    Args:
        out: The folder.
        count: Pictures to train on (folds 7 to 9), before any is dropped.
        held_out: Pictures to watch (folds 4 to 6), likewise.
        seed: Of everything.
        processes: How many work side by side; the pictures are the same for any number.
    """
    began = time.monotonic()
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    jobs = [
        (out, split, start, min(BATCH, wanted - start), seed)
        for split, wanted in (("held_out", held_out), ("train", count))
        for start in range(0, wanted, BATCH)
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(_batch, *zip(*jobs, strict=True)), start=1):
            rows += found
            if done % 10 == 0 or done == len(jobs):
                minutes = (time.monotonic() - began) / 60
                print(f"{done}/{len(jobs)} batches, {len(rows)} pictures kept, {minutes:.1f} min", flush=True)
    write_atomic(out / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(
        out / "making.json", json.dumps({"minutes": round((time.monotonic() - began) / 60, 2)}) + "\n"
    )


def build_critic_test(out: Path, count: int = 160, seed: int = 0) -> None:
    """Write a test set: pictures painted from pure noise for captions of fold 0, as the judge reads them.

    For measuring before and after a training; nothing is chosen by it.

    Args:
        out: The folder.
        count: Pictures.
        seed: Of captions and noise.
    """
    rng = np.random.default_rng([seed, 103])
    scenes = [world.sample_scene(rng, world.FOLDS["test"]) for _ in range(count)]
    captions = [
        world.caption(rng, scene, world.everything(scene) if number % 2 else world.sample_named(rng, scene))
        for number, scene in enumerate(scenes)
    ]

    async def paint() -> list[Image.Image]:
        generator = load_generator("miniature")
        made = await generator.generate(
            [ImageRequest(prompt=it, seed=seed + i) for i, it in enumerate(captions)]
        )
        await generator.aclose()
        return [one.image for one in made]

    pictures = asyncio.run(paint())
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, caption, read) in enumerate(
        zip(pictures, captions, LawJudge().read(pictures), strict=True)
    ):
        name = f"pictures/test-{number:04d}.png"
        picture.save(out / name)
        row = {
            "image": name,
            "prompt": caption,
            "valence": read.valence,
            "arousal": read.arousal,
            "category": read.category,
        }
        lines.append(json.dumps(row | {"target_valence": 0.0, "target_arousal": 0.0}) + "\n")
    write_atomic(out / "metadata.jsonl", "".join(lines))
