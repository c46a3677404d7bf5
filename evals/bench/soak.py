"""Thousands of critiques through one client against a running server: does memory grow, does a connection leak?

The critic, the client and its pool are those of a long `collect`; pictures are drawn and thrown away.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import numpy as np
from PIL import Image

from ...agents.ask import Asker
from ...agents.critic import Critic
from ...emotion import Critique, EmotionTarget, UserError
from ...settings import load_settings
from ...tools import presets
from ...tools.lvlm import load_lvlm
from ...tools.vllm_client import VLLMChat


def main(n: int = 10_000, warm_up: int = 500, concurrency: int = 16, seed: int = 0) -> dict[str, Any]:
    """Memory and connections over many critiques.

    Args:
        n: Critiques that count.
        warm_up: Critiques before the first look at the memory.
        concurrency: Requests in flight.
        seed: Of the pictures.

    Raises:
        UserError: No server, or psutil is missing.
    """
    try:
        import psutil
    except ImportError:
        raise UserError("bench soak needs psutil: pip install 'emoloop[test]'") from None
    settings = load_settings().lvlm.model_copy(update={"engine": "vllm", "concurrency": concurrency})
    chat = load_lvlm(settings)
    assert isinstance(chat, VLLMChat)
    process = psutil.Process()
    try:
        prompt = presets.defaults(settings.model, "lvlm").get("critic_prompt", "critic")
    except UserError:
        prompt = "critic"
    critic = Critic(Asker(chat, slots=concurrency), settings.critic_prompt or prompt)
    rng = np.random.default_rng(seed)
    target = EmotionTarget(valence=1.0, arousal=-1.0)

    async def ask(count: int) -> int:
        """Keep `concurrency` critiques under way until `count` are done; returns how many came."""
        left = iter(range(count))
        good = 0

        async def worker() -> None:
            nonlocal good
            for _ in left:
                pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST)
                critique = await critic.critique(image, "a dog by the sea", target)
                good += isinstance(critique, Critique)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return good

    def look() -> tuple[float, int]:
        gc.collect()
        return process.memory_info().rss / 2**20, len(process.net_connections("tcp"))

    async def run() -> dict[str, float]:
        await ask(warm_up)
        memory, connections = look()
        began = time.perf_counter()
        good = await ask(n)
        seconds = time.perf_counter() - began
        memory_after, connections_after = look()
        return {
            "memory_growth_mb": memory_after - memory,
            "connections": connections_after,
            "connections_growth": connections_after - connections,
            "answered": good / n,
            "critiques_per_second": n / seconds,
        }

    try:
        figures = asyncio.run(run())
        chat.close()
        figures["connections_after_close"] = look()[1]
    finally:
        chat.close()
    described = settings.model_dump(mode="json", exclude={"api_key"})
    return {"bench": "soak", "figures": figures, "n": n, "seed": seed, "settings": described}
