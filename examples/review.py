"""A person between the rounds: `interrupt()` asks, `Command(resume=…)` answers."""

import asyncio
from typing import Any

from emoloop import open_loop
from langgraph.types import Command


async def main() -> None:
    """Ask before each rewrite, and answer with a prompt of our own."""
    async with open_loop(loop={"rounds": 2, "images": 2, "review": True}) as loop:
        thread: Any = {"configurable": {"thread_id": "reviewed"}}
        request: Any = {"prompt": "a cat in the city", "target": {"valence": -2.0}, "seed": 1}
        await loop.graph.ainvoke(request, thread)
        state = await loop.graph.aget_state(thread)
        [question] = state.interrupts
        print("asked:", sorted(question.value))

        # {"comment": …} tells the rewriter, {"prompt": …} replaces it, {"stop": True} ends the run.
        answer: Any = Command(resume={"prompt": "a cat in the city in dark light"})
        done = await loop.graph.ainvoke(answer, thread)
        print([round["prompt"] for round in done["rounds"]], done["status"])


if __name__ == "__main__":
    asyncio.run(main())
