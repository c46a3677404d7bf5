"""The graph for LangGraph's own server: `langgraph dev` in the repository's root opens it in Studio.

The server asks for a graph at every request, from several event loops, and brings its own checkpointer; so models are
loaded once, at the first request, and the graph is built without a saver. Settings come from environment and
`emoloop.toml`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langgraph.graph.state import CompiledStateGraph

from .build import build_graph
from .loop import Loop, open_loop

#: One thread, so that requests that arrive together wait for the same loop.
_opener = ThreadPoolExecutor(1, thread_name_prefix="emoloop-open")
_loop: Loop | None = None


def _open() -> Loop:
    global _loop
    if _loop is None:
        _loop = open_loop().__enter__()
    return _loop


async def graph() -> CompiledStateGraph[Any, Any, Any, Any]:
    """The compiled loop."""
    opened = await asyncio.get_running_loop().run_in_executor(_opener, _open)
    return build_graph(opened.parts)


def close() -> None:
    """Close what was opened: the last spans are sent, the models freed."""
    global _loop
    if _loop is not None:
        _loop.__exit__()
        _loop = None
