"""What LangGraph's server serves in these tests: our own entry point, over models of a fixed latency.

Of a prompt with "held" in it one picture is painted, and the next ones wait until the run is cancelled.
"""

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from emoloop.graph import dev
from emoloop.graph.loop import open_loop
from emoloop.tools.images.base import GeneratedImage, ImageRequest
from painter import Painter
from scripted import Scripted


class Holding(Painter):
    seen: ClassVar[dict[str, int]] = {}

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        for prompt in (request.prompt for request in requests if "held" in request.prompt):
            self.seen[prompt] = self.seen.get(prompt, 0) + 1
            if self.seen[prompt] == 2:
                await asyncio.Event().wait()
        return await super().generate(requests)


dev.open_loop = lambda: open_loop(
    generator=Holding(delay=0.02),
    lvlm=Scripted(delay=0.02),
    loop={"rounds": 2, "images": 2, "patience": 3},
)
graph = dev.graph
