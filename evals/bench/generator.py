"""The ways to run a generator's network, side by side: pictures a second, and how far their pictures lie apart.

Each is measured by itself, since two of a large model do not fit on a GPU, in whole batches of the same prompts and
seeds; loading and the first batch, in which it compiles or exports, are its preparation. `--tune` keeps the fastest of
those whose pictures agree with the eager ones, for `generator.backend = "tuned"`.
"""

from __future__ import annotations

import asyncio
import time
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch

from ...domain import first_line
from ...settings import load_settings
from ...tools.fingerprint import versions
from ...tools.images.backends import Way, fingerprint, remember
from ...tools.images.base import ImageRequest
from ...tools.images.load import load_generator
from .coalesce import PROMPTS

#: Most that a pixel may differ from the eager one's, of 255; what another batch size may change too.
TOLERANCE = 2


def main(
    model: str = "",
    adapter: str = "",
    steps: int = 0,
    batches: int = 2,
    repeats: int = 3,
    tune: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Backends of the generator: pictures a second, preparation, largest difference to eager pictures.

    Args:
        model: A preset or folder; by default the settings'.
        adapter: An adapter; by default the settings'.
        steps: Denoising steps; 0 leaves them to the model.
        batches: Of a repetition.
        repeats: How often each way is measured; medians count.
        tune: Remember the fastest for this model on this machine.
        seed: Of the first picture.

    Returns:
        The document with `figures`, of each way WAY_images_per_second, WAY_ratio to eager, WAY_prepare_seconds and
        WAY_max_difference of a pixel (0 to 255); `notes` say which ways do not run here, `chosen` which was kept, and
        `kept` where.
    """
    base = load_settings().generator
    given = {"model": model or base.model, "adapter": adapter or base.adapter, "steps": steps or base.steps}
    base = base.model_copy(update={**given, "backend": "eager", "attention": None, "fuse_lora": False})
    notes: list[str] = []
    marks: list[str] = []
    prepared: dict[Way, float] = {}
    seconds: dict[Way, float] = {}
    pictures: dict[Way, np.ndarray] = {}

    async def draw(generator: Any, count: int) -> np.ndarray:
        asked = [ImageRequest(PROMPTS[n % len(PROMPTS)], seed + n) for n in range(count)]
        return np.stack([np.asarray(it.image, np.int16) for it in await generator.generate(asked)])

    async def measure(way: Way) -> None:
        began, spent = time.perf_counter(), list[float]()
        generator: Any = load_generator(base.model_copy(update=way._asdict()))
        try:
            marks.append(fingerprint(generator.describe()))
            await draw(generator, generator.micro_batch)
            prepared[way] = time.perf_counter() - began
            for _ in range(repeats):
                began = time.perf_counter()
                pictures[way] = await draw(generator, batches * generator.micro_batch)
                spent.append((time.perf_counter() - began) / len(pictures[way]))
            seconds[way] = median(spent)
        finally:
            await generator.aclose()

    for way in _ways(base.adapter is not None):
        try:
            asyncio.run(measure(way))
        except Exception as error:  # whatever a kernel or a compiler says
            if way == Way():
                raise
            notes.append(f"{way.name}: {first_line(error.__cause__ or error)}")
    apart = {way: int(np.abs(it - pictures[Way()]).max()) for way, it in pictures.items()}
    figures: dict[str, float] = {}
    for way in seconds:
        figures |= {
            f"{way.name}_images_per_second": 1 / seconds[way],
            f"{way.name}_ratio": seconds[Way()] / seconds[way],
            f"{way.name}_prepare_seconds": prepared[way],
            f"{way.name}_max_difference": float(apart[way]),
        }
    chosen = min((way for way in seconds if apart[way] <= TOLERANCE), key=seconds.__getitem__)
    kept = {"kept": str(remember(marks[0], chosen)), "use": 'generator.backend = "tuned"'} if tune else {}
    libraries = versions("torch", "diffusers", "onnxruntime")
    return {
        "figures": figures,
        "n": repeats,
        "notes": notes,
        "chosen": chosen.name,
        **kept,
        "versions": libraries,
    }


def _ways(adapted: bool) -> list[Way]:
    """What may be worth a try here; the eager way first."""
    ways = [Way(), Way("compile", None, adapted)]
    if adapted:
        ways.insert(1, Way("eager", None, True))
    if torch.cuda.is_available():
        ways += [
            Way(backend, name, adapted)
            for name in ("_native_cudnn", "flash", "sage")
            for backend in ("eager", "compile")
        ]
    elif find_spec("onnxruntime"):
        ways.append(Way("onnxruntime", None, adapted))
    return ways
