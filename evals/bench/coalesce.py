"""Many runs on one pipeline: how many pictures a second remain of what the bare pipeline makes at the same batch size?

The runs ask for one picture at a time and their prompts differ; what fills the batches is the generator. The bare
pipeline gets whole batches of the same prompts, one after the other. Its text encoders run in each call, as they do
when nobody keeps embeddings.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from typing import Any

from ...domain import RunStatus
from ...graph.loop import open_loop
from ...settings import GeneratorSettings, load_settings
from ...tools.images.load import load_generator
from .fakes import FakeLVLM

#: Neutral prompts, gone through in turn.
PROMPTS = ("a dog by the sea", "a cat in a meadow", "a house", "a boat in the snow", "a tree in the city")

#: Wall and CPU seconds.
Cost = tuple[float, float]


def main(
    model: str = "miniature",
    runs: int = 16,
    images: int = 8,
    rounds: int = 1,
    batch: int = 8,
    steps: int = 0,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Pictures a second of concurrent runs over those of the bare pipeline.

    Args:
        model: A preset or folder of a diffusers pipeline.
        runs: Runs at a time.
        images: Pictures in a round.
        rounds: Rounds of each.
        batch: Pictures in a forward pass, of both.
        steps: Denoising steps; 0 leaves them to the model.
        repeats: How often both are measured in turn; the best ratios count, since what else runs only makes them worse.
        seed: Of the first run.
    """
    from ...tools.images.diffusers import DiffusersGenerator

    settings = GeneratorSettings(model=model, micro_batch=batch, steps=steps or None)
    generator = load_generator(settings)
    assert isinstance(generator, DiffusersGenerator)
    count = runs * rounds * images
    ours: list[Cost] = []
    bare: list[Cost] = []
    forward, asked = generator._forward, [0, 0]

    def counted(rows: Any, size: int) -> Any:
        asked[0], asked[1] = asked[0] + len(rows), asked[1] + size
        return forward(rows, size)

    generator._forward = counted
    bare_cost(generator, batch, batch)  # whatever is made on the first call
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(prefix="emoloop-coalesce-") as home:
            first = seed + repeat * runs
            ours.append(asyncio.run(loop_cost(generator, home, runs, images, rounds, first)))
        bare.append(bare_cost(generator, count, batch))
    asyncio.run(generator.aclose())
    wall, cpu = (max(b[axis] / o[axis] for b, o in zip(bare, ours, strict=True)) for axis in (0, 1))
    figures = {
        "efficiency": wall,
        "cpu_efficiency": cpu,
        "filled": asked[0] / asked[1],
        "images_per_second": count / min(cost[0] for cost in ours),
        "images_per_second_bare": count / min(cost[0] for cost in bare),
        "cpu_seconds_per_image": min(cost[1] for cost in ours) / count,
        "cpu_seconds_per_image_bare": min(cost[1] for cost in bare) / count,
    }
    about = generator.describe()
    return {
        "figures": figures,
        "n": repeats,
        "generator": {k: about[k] for k in ("model", "device", "dtype", "steps")},
    }


async def loop_cost(
    generator: Any, home: str, runs: int, images: int, rounds: int, seed: int, lvlm: Any = None
) -> Cost:
    """What concurrent runs take that nothing ends early; `lvlm` in the place of one that answers at once."""
    options = {"rounds": rounds, "images": images, "proposals": 1, "patience": rounds, "tolerance": 0.0}
    base = load_settings({"loop": options, "lvlm": {"concurrency": runs}})
    async with open_loop(base, generator=generator, lvlm=lvlm or FakeLVLM(), home=home) as loop:
        target = {"valence": 2.0, "arousal": -1.0}
        began = time.perf_counter(), time.process_time()
        results = await asyncio.gather(
            *(loop.run(PROMPTS[n % len(PROMPTS)], target, seed=seed + n) for n in range(runs))
        )
        cost = time.perf_counter() - began[0], time.process_time() - began[1]
    assert all(it.status is RunStatus.COMPLETED for it in results)
    return cost


def bare_cost(generator: Any, count: int, batch: int) -> Cost:
    """What the pipeline by itself takes for as many pictures in whole batches."""
    import torch

    began = time.perf_counter(), time.process_time()
    for start in range(0, count, batch):
        seeds = range(start, min(start + batch, count))
        generator.pipe(
            [PROMPTS[n % len(PROMPTS)] for n in seeds],
            height=generator.height,
            width=generator.width,
            num_inference_steps=generator.steps,
            guidance_scale=generator.guidance,
            generator=[torch.Generator("cpu").manual_seed(n) for n in seeds],
            **generator.family.call,
        )
    return time.perf_counter() - began[0], time.process_time() - began[1]
