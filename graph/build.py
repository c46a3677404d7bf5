"""The graph: generate → critique → stop or (review →) rewrite → generate …, and a final round before the end.

Models are bound when the graph is built and settings of a call travel as `Context`, so that `ainvoke` needs
nothing but a thread id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import NodeTimeoutError
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from pydantic import BaseModel, create_model

from ..agents.rewriters.mc_agent.graph import MC_AGENT
from ..domain import UserError
from ..settings import LoopSettings
from .nodes import Nodes
from .parts import Parts
from .retry import retry_policy
from .rounds import wanted
from .state import Context, RunInput, State


class _AsyncGraph(CompiledStateGraph[State, Context, RunInput, State]):
    """A compiled graph that says what to call in place of `invoke` and `stream`: its nodes are coroutines."""

    def stream(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            "the loop's graph is async: use `ainvoke` or `astream`; `loop.run_sync(…)` works without asyncio"
        )

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        # What `as_tool` asks for: from a bare `TypedDict` it would make a tool that requires every key.
        required, kinds = self.get_input_jsonschema(config)["required"], get_type_hints(RunInput)
        keys: Any = {key: (kind, ... if key in required else None) for key, kind in kinds.items()}
        return create_model(RunInput.__name__, **keys)


_Node = Callable[[State, Runtime[Context]], Coroutine[Any, Any, dict[str, Any]]]

#: generate, critique, review, rewrite.
_STEPS_PER_ROUND = 4


def _most_rounds() -> int:
    """The settings' own upper limit, so that a call's context may ask for any allowed number of rounds."""
    return next(m.le for m in LoopSettings.model_fields["rounds"].metadata if hasattr(m, "le"))


def build_graph(
    parts: Parts, checkpointer: BaseCheckpointSaver[Any] | None = None
) -> CompiledStateGraph[State, Context, RunInput, State]:
    """Compile the loop.

    Args:
        parts: What the nodes work with.
        checkpointer: Where states are saved; None under a server that brings its own.
    """
    nodes = Nodes(parts)
    graph = StateGraph(State, context_schema=Context, input_schema=RunInput)
    graph.set_node_defaults(retry_policy=retry_policy())
    seconds = parts.settings.loop.node_timeout
    graph.add_node("start", _timed(nodes.start, seconds))
    graph.add_node("generate", _timed(nodes.generate, seconds))
    graph.add_node("critique", _timed(nodes.critique, seconds))
    graph.add_node("review", _timed(nodes.review, seconds))
    graph.add_node("rewrite", _rewriting(_timed(nodes.rewrite, seconds)))
    graph.add_node("final", _timed(nodes.final, seconds))
    graph.add_node("finish", _timed(nodes.finish, seconds))
    graph.add_edge(START, "start")
    graph.add_conditional_edges("start", _first, ["rewrite", "generate"])
    graph.add_conditional_edges("generate", _or_finish("critique"), ["critique", "finish"])
    graph.add_conditional_edges("critique", _after_critique, ["review", "rewrite", "final", "finish"])
    graph.add_conditional_edges("review", _or_finish("rewrite"), ["rewrite", "finish"])
    graph.add_edge("rewrite", "generate")
    graph.add_edge("final", "generate")
    graph.add_edge("finish", END)
    compiled: Any = graph.compile(checkpointer=checkpointer, name="emoloop")
    compiled.__class__ = _AsyncGraph
    return compiled.with_config(recursion_limit=_STEPS_PER_ROUND * (_most_rounds() + 1) + 3)


def _timed(node: _Node, seconds: float) -> Any:
    # Not LangGraph's `timeout`: that one leaves the node at work when its time is up, beside its own second try,
    # and drops a cancellation that comes while it puts its watchdog away.
    async def timed(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await node(state, runtime)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise NodeTimeoutError(node.__name__, seconds, kind="run", run_timeout=seconds) from error

    return timed


def _rewriting(node: _Node) -> Any:
    async def rewrite(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        # LangGraph draws, streams and saves the subgraphs that a node's function names.
        _ = MC_AGENT
        return await node(state, runtime)

    return rewrite


# Coroutines, since LangGraph sends a plain function of an async graph through a thread.
async def _first(state: State) -> str:
    return "rewrite" if wanted(0, state["options"]) else "generate"


def _or_finish(onward: str) -> Any:
    async def route(state: State) -> str:
        return "finish" if state.get("stop_reason") else onward

    return route


async def _after_critique(state: State) -> str:
    if state.get("stop_reason"):
        return "finish"
    if state.get("ended"):
        return "final"
    return "review" if state["options"]["review"] else "rewrite"
