"""The graph for LangGraph's own server: `langgraph dev` in the repository's root opens it in Studio.

The server asks for a graph at every request and brings its own checkpointer, so models are loaded once, at the
first request, and the graph is built without one. Settings come from environment and `emoloop.toml`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from langgraph.graph.state import CompiledStateGraph

from .build import build_graph
from .loop import Loop, open_loop

_opening: asyncio.Task[Loop] | None = None


async def _open() -> Loop:
    return await (await asyncio.to_thread(open_loop)).__aenter__()


async def graph() -> CompiledStateGraph[Any, Any, Any, Any]:
    """The compiled loop; the server closes with its process, and so do the models."""
    global _opening
    if _opening is None or (_opening.done() and (_opening.cancelled() or _opening.exception() is not None)):
        # No await before this: requests that arrive together wait for the same loop.
        _opening = asyncio.create_task(_open())
    # Shielded: a request that is given up must not take the models of the others with it.
    opened = await asyncio.shield(_opening)
    return build_graph(opened.parts)
