"""The loop as a node of your own LangGraph graph, with your checkpointer and streamed events."""

import asyncio
from typing import Any

from emoloop import open_loop
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict


class Story(TypedDict):
    """The parent's state: nothing of it is emoloop's."""

    scene: str
    mood: float
    picture: str
    gain: float | None


async def main() -> None:
    """Open the loop once, build the parent, run it."""
    async with open_loop(loop={"rounds": 2, "images": 2}) as loop:

        async def imagine(state: Story) -> dict[str, Any]:
            return {"scene": "a dog by the sea", "mood": 2.0}

        async def illustrate(state: Story) -> dict[str, Any]:
            # `run` has its own thread in the loop's own saver; the id names it in the log.
            result = await loop.run(state["scene"], {"valence": state["mood"]}, seed=3)
            assert result.best is not None, result.warnings
            return {"picture": str(result.best.path), "gain": result.gain}

        graph: Any = StateGraph(Story)
        graph.add_node("imagine", imagine)
        graph.add_node("illustrate", illustrate)
        graph.add_edge(START, "imagine")
        graph.add_edge("imagine", "illustrate")
        graph.add_edge("illustrate", END)
        parent = graph.compile(checkpointer=InMemorySaver())
        story = await parent.ainvoke({}, {"configurable": {"thread_id": "story-1"}})
        print(story)

        # The compiled loop by itself: state in, state out, a thread id and nothing else.
        thread: Any = {"configurable": {"thread_id": "alone"}}
        request: Any = {"prompt": "a cat in the city", "target": {"valence": -1.0}, "seed": 1}
        async for mode, part in loop.graph.astream(request, thread, stream_mode=["updates", "custom"]):
            print(mode, list(part)[:3] if isinstance(part, dict) else part)
        state = (await loop.graph.aget_state(thread)).values
        print(state["status"], state["best"]["sha256"][:12], state["gain"])


if __name__ == "__main__":
    asyncio.run(main())
