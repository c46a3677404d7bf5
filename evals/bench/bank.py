"""What a bank of visual prompts costs and finds, on pictures of the embedded world.

Scenes are drawn at random, described by their captions and labelled by the law that the world is made of; that is not
timed. `seconds` is the whole build: both encoders (the embedded models), clustering, thumbnails; `cpu_seconds` what it
took of all cores. `query_ms` is the median retrieval by a text feature, `asked_ms` that by a prompt, encoding included.
`agreement` is the share of held-out captions whose nearest entry of all is of their own emotion, `chance` what naming
the commonest one reaches.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ...domain import Emotion, EmotionTarget
from ...miniature import law, world
from ...tools.bank.bank import Bank, Item, build
from ...tools.bank.encoders import text_encoder, visual_encoder
from ...tools.bank.sheet import save_sheet

#: Retrievals that are timed.
_QUERIES = 200


def main(
    n: int = 10_000, length: int = 16, k: int = 4, cells: int = 0, text: str = "generator", visual: str = "lvlm",
    seed: int = 0, sheet: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Build a bank of the embedded world's pictures and ask it.

    Args:
        n: Pictures.
        length: Entries of an emotion.
        k: Entries retrieved.
        cells: As for `emoloop bank build`.
        text: Text encoder.
        visual: Visual encoder.
        seed: Of the scenes.
        sheet: Where to write the page; "" for nowhere.

    Returns:
        The document with `figures`: seconds, cpu_seconds, query_ms, asked_ms, agreement, chance, entries, megabytes.
    """
    items = list(_items(n, seed, cells > 0))
    began, cpu = time.perf_counter(), time.process_time()
    encoder = text_encoder(text)
    bank = build(items, encoder, visual_encoder(visual), cells=cells, length=length, seed=seed)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.safetensors"
        bank.save(file)
        size, bank = file.stat().st_size, Bank.load(file)
    asked = items[:_QUERIES]
    features = [encoder.texts([it.text])[0] for it in asked]
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "query_ms": _milliseconds(
            partial(bank.retrieve, feature, it.target, k) for feature, it in zip(features, asked, strict=True)
        ),
        "asked_ms": _milliseconds(partial(_ask, bank, encoder, it, k) for it in asked),
        "entries": float(len(bank.emotion)),
        "megabytes": size / 2**20,
    }
    figures |= {name: getattr(bank.head, name) for name in ("agreement", "chance")}
    if sheet:
        save_sheet(bank, Path(sheet), asked[0].text, features[0], k)
    encoders = {"text": bank.head.text_encoder, "visual": bank.head.visual_encoder}
    return {"figures": figures, "n": n, "tested": bank.head.tested, "encoders": encoders}


def _items(n: int, seed: int, numbers: bool) -> Iterator[Item]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        scene = world.sample_scene(rng)
        pixels = world.render(scene)
        valence, arousal = law.affect(scene, pixels)
        if numbers:
            felt = EmotionTarget(valence=valence, arousal=arousal)
        else:
            # Alone: what stands around may pull a category away from where the numbers lie.
            felt = EmotionTarget(category=Emotion(law.category(valence, arousal, scene.companions)))
        told = world.caption(rng, scene, world.everything(scene))
        yield Item(told, partial(Image.fromarray, pixels), felt)


def _ask(bank: Bank, encoder: Any, item: Item, k: int) -> None:
    bank.retrieve(encoder.texts([item.text])[0], item.target, k)


def _milliseconds(calls: Iterator[Callable[[], object]]) -> float:
    took = []
    for call in calls:
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return median(took)
