"""The compiled graph as LangGraph's own means use it: fan-outs, parents, answers, edits, forks, other savers."""

import asyncio
import operator
import time
from collections import Counter
from typing import Annotated, Any
from uuid import UUID

import pytest
from emoloop.domain import UserError
from emoloop.events import HumanFeedback, ImageGenerated, Rewritten, RunStarted
from emoloop.graph import dev
from emoloop.graph.build import build_graph
from emoloop.graph.loop import Loop, open_loop
from emoloop.rl.data.chats import rewriter_turns
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


async def test_as_a_tool_it_asks_for_what_must_be_there_alone(tmp_path):
    async with make(tmp_path, rounds=1) as loop:
        tool: Any = loop.graph.as_tool(name="paint", description="Paint what a person shall feel.")
        shape = tool.args_schema.model_json_schema()
        assert (shape["required"], list(shape["properties"])) == (
            ["prompt", "target"],
            ["prompt", "target", "seed"],
        )
        await check_own(loop, [await tool.ainvoke(request(), thread("tool"))])
        out = await tool.ainvoke(request(seed=5), thread("seeded"))
        assert (await loop.recorder.events(out["run_id"]))[0].seed == 5


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


@pytest.mark.parametrize("name", ["user 1/chat", "../../etc", "", "x" * 200, 7, UUID(int=7)], ids=str)
async def test_a_hosts_thread_id_is_whatever_the_host_likes(tmp_path, name):
    async with make(tmp_path, rounds=1) as loop:
        outs = [await loop.graph.ainvoke(request(), thread(it)) for it in (name, f"{name}|")]
        await check_own(loop, outs)
        for out in outs:
            assert (await loop.resume(out["run_id"])).run_id == out["run_id"]


async def test_requests_that_reach_a_server_first_and_together_open_one_loop(tmp_path, monkeypatch):
    """A server asks from several event loops; one of the requests may be given up."""
    opened: list[Loop] = []

    def fake_open() -> Loop:
        time.sleep(0.2)
        opened.append(make(tmp_path, rounds=1))
        return opened[-1]

    monkeypatch.setattr(dev, "open_loop", fake_open)

    async def ask(name: str) -> dict[str, Any]:
        return await (await dev.graph()).ainvoke(request(), thread(name))

    try:
        given_up = asyncio.create_task(ask("t"))
        await asyncio.sleep(0)
        elsewhere = [asyncio.to_thread(asyncio.run, ask(f"e{number}")) for number in range(3)]
        here = asyncio.gather(*(ask(f"t{number}") for number in range(3)), *elsewhere)
        given_up.cancel()
        outs = await here
        assert len(opened) == 1
        await check_own(opened[0], list(outs))
    finally:
        dev.close()
    with pytest.raises(RuntimeError, match="not open"):
        _ = opened[0].parts


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


ANSWERS = [
    {"prompt": "a bright dog"},
    "warmer",
    {"comment": "calmer", "prompt": "a calm dog"},
    {"stop": True},
    {},
]


@pytest.mark.parametrize("first", ANSWERS, ids=str)
async def test_a_review_answered_otherwise_is_a_fork_and_answered_alike_the_same_run(tmp_path, first):
    async with make(tmp_path, rounds=3, review=True) as loop:
        graph, where = loop.graph, thread("t")
        asked: Any = await graph.ainvoke(request(seed=1), where)
        await graph.ainvoke(Command(resume=first or ""), where)
        while (await graph.aget_state(where)).next:
            await graph.ainvoke(Command(resume="go on"), where)
        before, past = await log(loop, "t"), await checkpoint(loop, "t", "review", 0)
        forks = set()
        for answer in ANSWERS:
            again: Any = await graph.ainvoke(None, past)
            assert again["__interrupt__"][0].value == {
                **asked["__interrupt__"][0].value,
                "events": len(before),
            }
            out: Any = await graph.ainvoke(Command(resume=answer or {"comment": ""}), where)
            events = await log(loop, out["run_id"])
            assert await log(loop, "t") == before
            if answer == first:
                assert out["run_id"] == "t"
                continue
            forks.add(out["run_id"])
            assert events[0].settings["parent"] == {"run_id": "t", "round": 1}
            assert painted(events, 0) == painted(before, 0)
            given = {"comment": answer} if isinstance(answer, str) else answer
            said = [e.comment for e in events if isinstance(e, HumanFeedback)]
            assert said[:1] == [given["comment"]] if "comment" in given else not said
            if "stop" in given:
                assert (out["stop_reason"], out["round"]) == ("stopped", 0)
            else:
                assert (out["round"], out["__interrupt__"][0].value["run_id"]) == (1, out["run_id"])
                assert {p for p, _ in painted(events, 1)} == {out["current"]}
                assert "prompt" not in given or out["current"] == given["prompt"]
        assert len(forks) == len(ANSWERS) - 1


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


# ---- edits


async def log(loop: Loop, run_id: str) -> list[Any]:
    return await loop.recorder.events(run_id)


def written(events: list[Any]) -> list[tuple[int, str, str]]:
    return [(e.round, e.prompt, e.model) for e in events if isinstance(e, Rewritten)]


def painted(events: list[Any], round: int) -> list[tuple[str, str]]:
    return [(e.prompt, e.sha256) for e in events if isinstance(e, ImageGenerated) and e.round == round]


async def checkpoint(loop: Loop, name: str, following: str, round: int) -> Any:
    """Where the graph stood before a node."""
    history = loop.graph.aget_state_history(thread(name))
    [found] = [it async for it in history if it.next == (following,) and it.values["round"] == round]
    return found.config


@pytest.mark.parametrize("round", [0, 1])
async def test_an_edited_prompt_is_painted_and_logged_as_a_humans(tmp_path, round):
    async with make(tmp_path) as loop:
        graph, where = loop.graph, thread("t")
        await graph.ainvoke(request(), where, interrupt_before=["generate"])
        if round:
            await graph.ainvoke(None, where, interrupt_before=["generate"])
        await graph.aupdate_state(where, {"current": "a  red house"})
        if not round:  # what the person wrote outlives the saved state
            await graph.ainvoke(None, where, interrupt_before=["critique"])
            await loop.forget("t")
            out = (await loop.resume("t")).model_dump()
        else:
            out = await graph.ainvoke(None, where)
        events = await log(loop, "t")
        assert out["run_id"] == "t" and out["rounds"][round]["prompt"] == "a red house"
        assert {prompt for prompt, _ in painted(events, round)} == {"a red house"}
        assert (round, "a red house", "human") in written(events)
        result = await loop.recorder.result("t")
        assert [it.prompt for it in result.rounds][round] == "a red house"
        turns = list(rewriter_turns(result, events))
        assert len(turns) == (1 if round == 0 else 0), (
            "a model is not taught what a person wrote in its place"
        )


async def test_a_fork_that_disagrees_with_the_log_is_a_run_that_names_its_parent(tmp_path):
    async with make(tmp_path, rounds=3) as loop:
        first = await loop.graph.ainvoke(request(seed=1), thread("t"))
        before = await log(loop, "t")
        where = await checkpoint(loop, "t", "generate", 1)
        edited: Any = await loop.graph.aupdate_state(where, {"current": "a red house"})
        out = await loop.graph.ainvoke(None, edited)
        events = await log(loop, out["run_id"])
        assert out["run_id"] != "t" and await log(loop, "t") == before
        assert events[0].settings["parent"] == {"run_id": "t", "round": 1}
        assert painted(events, 0) == painted(before, 0)
        assert {prompt for prompt, _ in painted(events, 1)} == {"a red house"}
        assert written(events)[0] == (1, "a red house", "human")
        result = await loop.recorder.result(out["run_id"])
        assert [it["prompt"] for it in out["rounds"]] == [it.prompt for it in result.rounds]
        assert (out["status"], out["best"]["image"]) == ("completed", str(result.best and result.best.path))
        assert out["rounds"][0] == first["rounds"][0] and out["rounds"][1] != first["rounds"][1]
        # The same edit again is the same fork, and the thread's next request a run of its own.
        again: Any = await loop.graph.aupdate_state(where, {"current": "a red house"})
        assert (await loop.graph.ainvoke(None, again))["run_id"] == out["run_id"]
        assert await log(loop, out["run_id"]) == events
        assert (await loop.graph.ainvoke(request("a cat"), thread("t")))["run_id"] == "t.2"


async def test_a_step_done_again_without_an_edit_is_the_same_run(tmp_path):
    async with make(tmp_path) as loop:
        first = await loop.graph.ainvoke(request(), thread("t"))
        before = await log(loop, "t")
        out = await loop.graph.ainvoke(None, await checkpoint(loop, "t", "generate", 1))
        assert out == first and await log(loop, "t") == before


@pytest.mark.parametrize(
    ("following", "edit", "said"),
    [
        ("generate", {"target": {"valence": -2}}, "new request"),
        ("generate", {"prompt": "a cat"}, "new request"),
        ("generate", {"current": " "}, "empty"),
        ("critique", {"target": {"valence": -2}}, "new request"),
        ("critique", {"current": "a cat"}, "as_node='rewrite'"),
    ],
)
async def test_an_edit_that_cannot_be_followed_is_refused(tmp_path, following, edit, said):
    async with make(tmp_path) as loop:
        await loop.graph.ainvoke(request(), thread("t"))
        before = await log(loop, "t")
        where: Any = await loop.graph.aupdate_state(await checkpoint(loop, "t", following, 1), edit)
        with pytest.raises(UserError, match=said):
            await loop.graph.ainvoke(None, where)
        assert await log(loop, "t") == before
