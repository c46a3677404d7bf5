"""The compiled graph as LangGraph's own means use it: fan-outs, parents, answers, edits, forks, other savers."""

import asyncio
import operator
from collections import Counter
from typing import Annotated, Any

import pytest
from emoloop.domain import UserError
from emoloop.events import ImageGenerated, RunStarted
from emoloop.graph import dev
from emoloop.graph.build import build_graph
from emoloop.graph.loop import Loop, open_loop
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send
from painter import Painter
from scripted import Scripted
from typing_extensions import TypedDict


def make(tmp_path, *, checkpointer: Any = None, **options) -> Loop:
    return open_loop(
        generator=Painter(),
        lvlm=Scripted(),
        home=str(tmp_path / "home"),
        loop={"rounds": 2, "images": 2, "patience": 3, **options},
        **({"checkpointer": checkpointer} if checkpointer else {}),
    )


def thread(name: Any) -> Any:
    return {"configurable": {"thread_id": name}}


def request(prompt: str = "a dog", **more: Any) -> Any:
    return {"prompt": prompt, "target": {"valence": 2}, **more}


async def check_own(loop: Loop, outs: list[dict[str, Any]]) -> None:
    """Each result is a run by itself, painted from its own prompt."""
    assert len({out["run_id"] for out in outs}) == len(outs)
    for out in outs:
        events = await loop.recorder.events(out["run_id"])
        assert [e.prompt for e in events if isinstance(e, RunStarted)] == [out["prompt"]]
        painted = {e.prompt for e in events if isinstance(e, ImageGenerated) and e.round == 0}
        assert painted == {out["prompt"]}


# ---- identity


class Fan(TypedDict, total=False):
    asked: list[str]
    prompt: str
    outs: Annotated[list[dict[str, Any]], operator.add]


@pytest.mark.parametrize("saver", [InMemorySaver, lambda: None])
@pytest.mark.parametrize("together", [False, True])
async def test_a_fan_out_under_one_thread_is_a_run_for_each_branch(tmp_path, saver, together):
    async with make(tmp_path, rounds=1) as loop:

        async def one(state: Fan) -> Fan:
            prompt = state["prompt"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            prompts = [prompt, f"{prompt} by the sea"] if together else [prompt]
            outs: Any = await asyncio.gather(*(loop.graph.ainvoke(request(p)) for p in prompts))
            return {"outs": list(outs)}

        graph: Any = StateGraph(Fan)
        graph.add_node("one", one)
        graph.add_conditional_edges(
            START, lambda state: [Send("one", {"prompt": p}) for p in state["asked"]], ["one"]
        )
        graph.add_edge("one", END)
        parent = graph.compile(checkpointer=saver())
        asked = ["a dog", "a cat", "a boat", "a boat"]
        outs = (await parent.ainvoke({"asked": asked}, thread("parent")))["outs"]
        assert Counter(out["prompt"] for out in outs if "sea" not in out["prompt"]) == Counter(asked)
        await check_own(loop, outs)


class Story(TypedDict, total=False):
    prompt: str
    target: dict[str, Any]
    run_id: str


async def test_a_subgraph_keeps_its_run_when_the_parent_is_resumed(tmp_path):
    async with make(tmp_path, rounds=2, review=True) as loop:
        graph: Any = StateGraph(Story)
        graph.add_node("loop", build_graph(loop.parts))
        graph.add_edge(START, "loop")
        parent = graph.compile(checkpointer=InMemorySaver())
        first = await parent.ainvoke(request(), thread("story"))
        asked = first["__interrupt__"][0].value
        done = await parent.ainvoke(Command(resume="brighter"), thread("story"))
        assert done["run_id"] == asked["run_id"]
        again = await parent.ainvoke(request("a cat"), thread("story"))
        assert again["__interrupt__"][0].value["run_id"] != done["run_id"]
        await check_own(loop, [done])


@pytest.mark.parametrize("seed", [None, 3])
async def test_runs_that_begin_in_one_thread_at_once_are_each_a_run(tmp_path, seed):
    async with make(tmp_path, rounds=1) as loop:
        asked = [request(p, seed=seed) for p in ("a dog", "a cat", "a house", "a boat")]
        outs = await asyncio.gather(*(loop.graph.ainvoke(it, thread(7)) for it in asked))
        assert [out["prompt"] for out in outs] == [it["prompt"] for it in asked]
        await check_own(loop, list(outs))


async def test_requests_that_reach_a_server_first_and_together_open_one_loop(tmp_path, monkeypatch):
    opened: list[Loop] = []

    def fake_open() -> Loop:
        opened.append(make(tmp_path, rounds=1))
        return opened[-1]

    monkeypatch.setattr(dev, "open_loop", fake_open)
    monkeypatch.setattr(dev, "_opening", None)
    graphs = await asyncio.gather(*(dev.graph() for _ in range(4)))
    try:
        assert len(opened) == 1
        outs = await asyncio.gather(
            *(graph.ainvoke(request(), thread(f"t{number}")) for number, graph in enumerate(graphs))
        )
        await check_own(opened[0], list(outs))
    finally:
        for loop in opened:
            await loop.__aexit__()


# ---- people


@pytest.mark.parametrize("wrong", [7, {"promt": "x"}, {"prompt": "x" * 9000}])
async def test_a_wrong_answer_is_asked_again_with_the_reason(tmp_path, wrong):
    async with make(tmp_path, review=True) as loop:
        first = await loop.graph.ainvoke(request(), thread("t"))
        for _ in range(2):
            again = await loop.graph.ainvoke(Command(resume=wrong), thread("t"))
            [asked] = [it.value for it in again["__interrupt__"]]
            assert asked.pop("wrong")
            assert asked == first["__interrupt__"][0].value
            assert (await loop.review("t") or {}).get("wrong")
        done = await loop.graph.ainvoke(Command(resume={"prompt": "a bright dog"}), thread("t"))
        assert [done["status"], done["current"]] == ["completed", "a bright dog"]


# ---- plain calls and savers


@pytest.mark.parametrize("call", ["invoke", "stream"])
def test_a_plain_call_says_what_to_use(tmp_path, call):
    with make(tmp_path) as loop:
        for graph in (loop.graph, loop.graph.with_config(tags=["mine"])):
            with pytest.raises(UserError, match="`ainvoke`"):
                getattr(graph, call)(request(), thread("t"))


async def test_a_saver_of_ones_own(tmp_path):
    saver = InMemorySaver()
    async with make(tmp_path, checkpointer=saver, review=True) as loop:
        result = await loop.run("a dog", {"valence": 2})
        assert saver.get_tuple(thread(result.run_id)) is not None
        assert not (tmp_path / "home" / "checkpoints.db").exists()
        state = loop.graph.get_state(thread(result.run_id))
        assert state.next == ("review",) and state == await loop.graph.aget_state(thread(result.run_id))
    async with make(tmp_path, checkpointer=saver, review=True) as loop:
        done = await loop.resume(result.run_id, {"prompt": "a bright dog"})
        assert done.rounds[1].prompt == "a bright dog"
