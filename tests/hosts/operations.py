"""What a LangGraph user does to a server, one operation a function; each says what the log must hold of it."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
from langgraph.graph import END, START, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph_sdk.client import LangGraphClient
from typing_extensions import TypedDict

GRAPH = "emoloop"


@dataclass
class Claim:
    """What the log must hold of a run.

    Attributes:
        run_id: Its name.
        prompt: The neutral prompt.
        values: The state that the server gave last; None where the run was broken off.
        told: The events of the `custom` stream; None where it was not followed from beginning to end.
        prompts: What certain rounds were painted from.
        parent: The run that a fork names.
    """

    run_id: str
    prompt: str
    values: dict[str, Any] | None = None
    told: list[dict[str, Any]] | None = None
    prompts: dict[int, str] = field(default_factory=dict)
    parent: str | None = None


class Operations:
    """One operation of a kind, on a server at an address; `prompt` is of this operation alone."""

    def __init__(self, url: str, prompt: str, draw: Random) -> None:
        self.url, self.prompt, self.draw = url, prompt, draw
        # A connection for each call: the server drops idle ones, and a busy machine lets them be idle.
        self.http = httpx.AsyncClient(
            base_url=url, timeout=None, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self.client = LangGraphClient(self.http)

    # ---- words

    def request(self, more: str = "", **changes: Any) -> dict[str, Any]:
        target = {"valence": self.draw.choice([-2, 0, 2]), "arousal": self.draw.choice([-1, 1])}
        return {"prompt": self.prompt + more, "target": target, **changes}

    def context(self, **more: Any) -> dict[str, Any]:
        return {"rounds": 2, "images": self.draw.choice([1, 2]), "exhaust": True, **more}

    async def thread(self) -> str:
        return (await self.client.threads.create())["thread_id"]

    async def wait(self, thread: str | None, given: Any, **more: Any) -> dict[str, Any]:
        out = await self.client.runs.wait(thread, GRAPH, input=given, **more)  # pyright: ignore
        assert isinstance(out, dict), out
        return out

    async def checkpoint(self, thread: str, following: str, round: int) -> Any:
        history = await self.client.threads.get_history(thread, limit=100)
        return next(
            it["checkpoint"]
            for it in reversed(history)
            if it["next"] == [following] and it["values"].get("round") == round
        )

    def claim(self, values: dict[str, Any], more: str = "", **known: Any) -> Claim:
        return Claim(values["run_id"], self.prompt + more, values, **known)

    # ---- runs

    async def plain(self) -> list[Claim]:
        """A run in a thread, then another in the same."""
        thread = await self.thread()
        first = await self.wait(thread, self.request(), context=self.context())
        second = await self.wait(thread, self.request(" again"), context=self.context())
        assert (first["run_id"], second["run_id"]) == (thread, f"{thread}.2")
        return [self.claim(first), self.claim(second, " again")]

    async def stateless(self) -> list[Claim]:
        """A run without a thread of the client's."""
        return [self.claim(await self.wait(None, self.request(), context=self.context()))]

    async def together(self) -> list[Claim]:
        """Runs in threads of their own at the same moment."""
        names = [f" {letter}" for letter in "abc"]
        outs = await asyncio.gather(
            *(self.wait(None, self.request(name), context=self.context(rounds=1)) for name in names)
        )
        return [self.claim(out, name) for out, name in zip(outs, names, strict=True)]

    async def queued(self) -> list[Claim]:
        """Runs in one thread at the same moment, one after the other by the server."""
        thread, names = await self.thread(), [" a", " b", " c"]
        runs = [
            await self.client.runs.create(
                thread,
                GRAPH,
                input=self.request(name),
                context=self.context(rounds=1),
                multitask_strategy="enqueue",
            )
            for name in names
        ]
        await asyncio.gather(*(self.client.runs.join(thread, run["run_id"]) for run in runs))
        last = await self.client.threads.get_state(thread)
        assert last["values"]["run_id"] == f"{thread}.3"  # pyright: ignore
        ids = thread, f"{thread}.2", f"{thread}.3"
        return [Claim(run_id, self.prompt + name) for run_id, name in zip(ids, names, strict=True)]

    async def displaced(self) -> list[Claim]:
        """A run that another of the same thread interrupts, rolls back, or is refused beside."""
        thread, strategy = await self.thread(), self.draw.choice(["interrupt", "rollback", "reject"])
        first = await self._held(thread, self.request(" held"))
        try:
            out = await self.wait(
                thread, self.request(" b"), context=self.context(), multitask_strategy=strategy
            )
        except httpx.HTTPStatusError as error:
            assert strategy == "reject" and error.response.status_code in (409, 422), error
            await self.client.runs.cancel(thread, first, wait=True)
            return [Claim(thread, f"{self.prompt} held")]
        assert strategy != "reject"
        return [Claim(thread, f"{self.prompt} held"), self.claim(out, " b")]

    async def cancelled(self) -> list[Claim]:
        """A run that is cancelled in the middle, and gone on with."""
        thread, action = await self.thread(), self.draw.choice(["interrupt", "rollback"])
        request = self.request(" held", seed=self.draw.randrange(1000))
        run = await self._held(thread, request)
        await self.client.runs.cancel(thread, run, wait=True, action=action)
        out = await self.wait(thread, None if action == "interrupt" else request, context=self.context())
        assert out["run_id"] == thread
        return [self.claim(out, " held")]

    async def left(self) -> list[Claim]:
        """A stream that its reader leaves, which cancels the run; then the same request again."""
        thread, request = await self.thread(), self.request(" held", seed=self.draw.randrange(1000))
        await self._held(thread, request, on_disconnect="cancel")
        out = await self.wait(thread, request, context=self.context(), multitask_strategy="enqueue")
        assert out["run_id"] == thread
        return [self.claim(out, " held")]

    async def _held(self, thread: str, request: dict[str, Any], on_disconnect: Any = "continue") -> str:
        """A run that has told of its first events and waits in the middle; its name on the server."""
        parts: Any = self.client.runs.stream(
            thread,
            GRAPH,
            input=request,
            context=self.context(images=2),
            stream_mode="custom",
            on_disconnect=on_disconnect,
        )
        run = ""
        async with aclosing(parts):
            async for part in parts:
                if part.event == "custom":
                    return run
                run = part.data["run_id"]
        raise AssertionError("nothing was told")

    # ---- streams

    async def streamed(self) -> list[Claim]:
        """All that is told of a run, in several modes at once."""
        thread = await self.thread()
        told: dict[str, list[Any]] = {}
        async for part in self.client.runs.stream(
            thread,
            GRAPH,
            input=self.request(),
            context=self.context(),
            stream_mode=["values", "updates", "custom", "debug", "messages-tuple", "events"],
        ):
            told.setdefault(part.event, []).append(part.data)
        assert "error" not in told, told["error"]
        assert list(told["updates"][0]) == ["start"]
        state = await self.client.threads.get_state(thread)
        assert state["values"] == told["values"][-1]
        return [self.claim(told["values"][-1], told=told["custom"])]

    async def joined(self) -> list[Claim]:
        """A run that was started in the background and is joined."""
        thread = await self.thread()
        run = await self.client.runs.create(
            thread, GRAPH, input=self.request(), context=self.context(), stream_mode=["custom"]
        )
        out: Any = await self.client.runs.join(thread, run["run_id"])
        return [self.claim(out)]

    async def remote(self) -> list[Claim]:
        """The server's graph as a node of a graph here."""

        class Story(TypedDict, total=False):
            prompt: str
            target: dict[str, Any]
            run_id: str
            rounds: list[Any]
            status: str
            best: Any

        graph: Any = StateGraph(Story)
        graph.add_node("far", RemoteGraph(GRAPH, url=self.url))
        graph.add_edge(START, "far")
        graph.add_edge("far", END)
        return [self.claim(await graph.compile().ainvoke(self.request()))]

    # ---- people

    async def edited(self) -> list[Claim]:
        """A prompt that is edited before it is painted."""
        thread, number = await self.thread(), self.draw.choice([0, 1])
        await self.wait(thread, self.request(), context=self.context(), interrupt_before=["generate"])
        if number:
            await self.wait(thread, None, context=self.context(), interrupt_before=["generate"])
        await self.client.threads.update_state(thread, {"current": f"{self.prompt} red"})
        out = await self.wait(thread, None, context=self.context())
        assert out["run_id"] == thread
        return [self.claim(out, prompts={number: f"{self.prompt} red"})]

    async def forked(self) -> list[Claim]:
        """A painted prompt that is edited in the history."""
        thread = await self.thread()
        first = await self.wait(thread, self.request(), context=self.context())
        past = await self.checkpoint(thread, "generate", 1)
        edited: Any = await self.client.threads.update_state(
            thread, {"current": f"{self.prompt} red"}, checkpoint=past
        )
        out = await self.wait(thread, None, context=self.context(), checkpoint=edited["checkpoint"])
        assert out["run_id"] != thread
        return [self.claim(first), self.claim(out, prompts={1: f"{self.prompt} red"}, parent=thread)]

    async def travelled(self) -> list[Claim]:
        """A step of the history that is done again without an edit."""
        thread = await self.thread()
        first = await self.wait(thread, self.request(), context=self.context())
        past = await self.checkpoint(thread, self.draw.choice(["generate", "critique"]), 1)
        out = await self.wait(thread, None, context=self.context(), checkpoint=past)
        assert out == first
        return [self.claim(first)]

    async def refused(self) -> list[Claim]:
        """An edit that cannot be followed: the client is told why, and the thread still serves."""
        thread = await self.thread()
        first = await self.wait(thread, self.request(), context=self.context())
        past = await self.checkpoint(thread, "generate", 1)
        edited: Any = await self.client.threads.update_state(thread, {"prompt": "a cat"}, checkpoint=past)
        await self._fails("new request", thread, None, checkpoint=edited["checkpoint"])
        out = await self.wait(thread, self.request(" b"), context=self.context())
        return [self.claim(first), self.claim(out, " b")]

    async def reviewed(self) -> list[Claim]:
        """A review that is answered wrongly, then rightly."""
        thread = await self.thread()
        await self.wait(thread, self.request(), context=self.context(review=True))
        if self.draw.random() < 0.5:
            again = await self.wait(thread, None, command={"resume": {"promt": "x"}})
            assert "wrong" in again["__interrupt__"][0]["value"]
        answer = self.draw.choice(["warmer", {"prompt": f"{self.prompt} bright"}, {"stop": True}])
        out = await self.wait(thread, None, command={"resume": answer})
        painted = answer.get("prompt") if isinstance(answer, dict) else None
        return [self.claim(out, prompts={1: painted} if painted else {})]

    async def reviewed_twice(self) -> list[Claim]:
        """A review that is answered, and answered otherwise in the history or in a copy of the thread."""
        thread = await self.thread()
        await self.wait(thread, self.request(), context=self.context(review=True))
        copied: Any = await self.client.threads.copy(thread)
        first = await self.wait(thread, None, command={"resume": {"prompt": f"{self.prompt} bright"}})
        if self.draw.random() < 0.5 and copied:
            other = copied["thread_id"]
        else:
            other = thread
            past = await self.checkpoint(thread, "review", 0)
            asked = await self.wait(thread, None, checkpoint=past)
            assert asked["__interrupt__"][0]["value"]["round"] == 0
        out = await self.wait(other, None, command={"resume": {"prompt": f"{self.prompt} dark"}})
        return [
            self.claim(first, prompts={1: f"{self.prompt} bright"}),
            self.claim(out, prompts={1: f"{self.prompt} dark"}, parent=thread),
        ]

    # ---- mistakes and pictures

    async def mistaken(self) -> list[Claim]:
        """A wrong request: the client is told what is wrong, and nothing is logged."""
        wrong, said = self.draw.choice(
            [
                ({"prompt": " "}, "prompt is empty"),
                ({"prompt": 5}, "must be text"),
                ({"prompt": None}, "must be text"),
                ({"target": {}}, "needs a valence"),
                ({"target": None}, "a target is"),
                ({"target": {"valence": 9}}, "from -3 to"),
                ({"seed": "x"}, "seed 'x'"),
            ]
        )
        request = {key: value for key, value in self.request(**wrong).items() if value is not None}
        await self._fails(said, None, request)
        await self._fails("rounds", None, self.request(), context={"rounds": 0})
        await self._fails("no.such", None, self.request(), context={"rewriter": "no.such:X"})
        return []

    async def _fails(self, said: str, thread: str | None, given: Any, **more: Any) -> None:
        try:
            out = await self.wait(thread, given, **more)
        except Exception as error:  # the SDK raises plain ones
            assert said in str(error), error
        else:
            raise AssertionError(out)

    async def pictured(self) -> list[Claim]:
        """The pictures that state and stream name, fetched from the server."""
        urls = []
        async for part in self.client.runs.stream(
            None, GRAPH, input=self.request(), context=self.context(), stream_mode=["custom", "values"]
        ):
            if part.event == "custom" and part.data["type"] == "image_generated":
                urls.append(part.data["url"])
            last = part.data
        assert last["best"]["url"] in urls
        for url in urls:
            answer = await self.http.get(url)
            assert answer.headers["content-type"] == "image/png"
            assert hashlib.sha256(answer.content).hexdigest() == url.rpartition("/")[2]
        for none in ("0" * 64, "%2e%2e", "x", "..%2f..%2fevents.db"):
            assert (await self.http.get(f"/images/{none}")).status_code == 404
        return [self.claim(last)]


KINDS = sorted(
    name for name, it in vars(Operations).items() if getattr(it, "__doc__", None) and name[0] != "_"
)
