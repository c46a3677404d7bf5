"""MC-Agent as a LangGraph of its own: cast → personas, all at once → director.

It runs inside the loop's `rewrite` node, where Studio draws it, or alone. State is plain JSON and small; what an answer
needs besides comes as context, and each answer is kept by the panel as soon as it is there, so that a run that broke
off asks no persona twice.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from langgraph.graph import END, START, StateGraph  # pyright: ignore[reportMissingTypeStubs]
from langgraph.runtime import Runtime
from langgraph.types import Send
from typing_extensions import TypedDict

from ....domain import Draft
from .panel import Panel
from .persona import draw

if TYPE_CHECKING:
    from ..base import RewriteRequest
    from .agent import MCAgent


class State(TypedDict):
    """Where a round's writing stands.

    Attributes:
        count: Prompts that are wanted.
        start: How many were asked for before in this round.
        seed: The round's.
        questions: Drafts that are asked for.
        personas: Who writes; they take turns where there are more questions than personas.
        drafts: What they wrote, by the number of the question; in the order in which it came.
        prompts: What the director hands over: fields of a `Rewrite`.
    """

    count: int
    start: int
    seed: int
    questions: int
    personas: NotRequired[list[str]]
    drafts: Annotated[NotRequired[list[dict[str, Any]]], operator.add]
    prompts: NotRequired[list[dict[str, Any]]]


class Question(TypedDict):
    """What one persona is asked."""

    number: int
    persona: str
    seed: int


@dataclass(frozen=True)
class Context:
    """What a round's writing goes by."""

    agent: MCAgent
    panel: Panel
    request: RewriteRequest


async def cast(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Draw the personas by the round's seed."""
    panel = runtime.context.panel
    return {"personas": [it.name for it in draw(panel.personas, state["seed"], panel.folder)]}


def ask_all(state: State) -> list[Send]:
    """A question for each draft that is wanted."""
    personas, first = state.get("personas", []), state["start"] * state["questions"]
    return [
        Send("persona", Question(number=number, persona=personas[number % len(personas)], seed=state["seed"]))
        for number in range(first, first + state["questions"])
    ]


async def persona(question: Question, runtime: Runtime[Context]) -> dict[str, Any]:
    """Ask one persona; what it answered before stands."""
    panel, number = runtime.context.panel, question["number"]
    answered = panel.answers.get(number)
    if answered is None:
        answered = await runtime.context.agent.draft(question, runtime.context)
        await panel.keep(number, answered)
    return {"drafts": [{"number": number, **answered.draft.model_dump()}]}


async def direct(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Merge or pick, check, explain."""
    drafts = {
        it["number"]: Draft(**{key: it[key] for key in it if key != "number"})
        for it in state.get("drafts", [])
    }
    prompts = await runtime.context.agent.direct(dict(sorted(drafts.items())), state, runtime.context)
    return {"prompts": prompts}


def _compiled() -> Any:
    graph: Any = StateGraph(State, context_schema=Context)
    graph.add_node("cast", cast)
    graph.add_node("persona", persona)
    graph.add_node("director", direct)
    graph.add_edge(START, "cast")
    graph.add_conditional_edges("cast", ask_all, ["persona"])
    graph.add_edge("persona", "director")
    graph.add_edge("director", END)
    return graph.compile(name="mc_agent")


#: The compiled graph; models and panel come as its context.
MC_AGENT = _compiled()
