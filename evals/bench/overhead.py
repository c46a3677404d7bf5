"""What the loop costs beside its models: CPU time and bytes a round, against LangGraph programs written by hand.

The programs do what any such loop has to do (make pictures, encode them, ask the chat model about each, read its
JSON, rewrite) and keep less: nothing (`bare`), or LangGraph's SQLite saver with pictures as files that the state
names (`saver_refs`), or with the pictures in the state (`saver_bytes`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from ...events import Event, Rewritten
from ...graph.loop import open_loop
from .fakes import FakeGenerator, FakeLVLM, picture

#: Seconds of CPU, over all threads, and bytes handed to the system.
Cost = tuple[float, float]
_REQUEST: Any = ("a dog by the sea", {"valence": 2.0, "arousal": -1.0})


def main(rounds: int = 3, images: int = 8, runs: int = 8, long: int = 50, repeats: int = 5) -> dict[str, Any]:
    """CPU time and bytes of a round beside LangGraph written by hand.

    Args:
        rounds: Rounds of a run.
        images: Pictures in a round.
        runs: Runs of each program in one repeat, one after the other.
        long: Rounds of the run whose last five rounds are compared with its first five.
        repeats: How often all programs are measured in turn; medians count. Bytes are those beside the picture files.
    """
    names = ("ours", "bare", "saver_refs", "saver_bytes")
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    growth: list[float] = []
    for _ in range(repeats):
        for name in names:
            costs[name].append(asyncio.run(_cost_of_a_round(name, rounds, images, runs)))
        growth.append(asyncio.run(_growth(long, images)))
    seconds, size = ({name: median(cost[axis] for cost in costs[name]) for name in names} for axis in (0, 1))
    figures = {f"time_ratio_{name}": seconds["ours"] / seconds[name] for name in names[1:]}
    figures |= {f"bytes_ratio_{name}": size["ours"] / size[name] for name in names[2:]}
    figures |= {f"milliseconds_{name}": 1000 * value for name, value in seconds.items()}
    figures |= {f"kilobytes_{name}": value / 1000 for name, value in size.items()}
    return {
        "figures": {**figures, "growth": median(growth)},
        "n": repeats,
    }


def _spent() -> Cost:
    file = Path("/proc/self/io")  # elsewhere the bytes stay unknown
    written = file.read_text().split("wchar: ")[1].split()[0] if file.exists() else "nan"
    return time.process_time(), float(written)


async def _cost_of_a_round(name: str, rounds: int, images: int, runs: int) -> Cost:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emoloop-overhead-")))
        run = await (_ours if name == "ours" else _by_hand)(stack, folder, name, rounds, images)
        await run(0)
        files, (begin, start) = _files(folder), _spent()
        for seed in range(runs):
            await run(1 + seed)
        end, stop = _spent()
        return (end - begin) / (runs * rounds), (stop - start - _files(folder) + files) / (runs * rounds)


def _files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.png"))


async def _ours(stack: AsyncExitStack, folder: Path, name: str, rounds: int, images: int) -> Any:
    # One prompt a round, as the graph by hand has it.
    options = {"rounds": rounds, "images": images, "proposals": 1, "patience": rounds, "tolerance": 0.0}
    loop = open_loop(generator=FakeGenerator(), lvlm=FakeLVLM(), home=str(folder), loop=options)
    await stack.enter_async_context(loop)
    return lambda seed, **more: loop.run(*_REQUEST, seed=seed, **more)


async def _growth(rounds: int, images: int) -> float:
    """CPU time of the last rounds over that of the first ones."""
    ends: list[float] = [time.process_time()]

    def follow(event: Event) -> None:
        if isinstance(event, Rewritten):
            ends.append(time.process_time())

    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emoloop-overhead-")))
        run = await _ours(stack, folder, "ours", rounds, images)
        await run(0, rounds=1)
        ends[0] = time.process_time()
        await run(1, on_event=follow)
    return (ends[-1] - ends[-6]) / (ends[5] - ends[0])


class _State(TypedDict):
    seed: int
    round: int
    prompt: str
    images: list[Any]
    history: list[dict[str, Any]]


async def _by_hand(stack: AsyncExitStack, folder: Path, name: str, rounds: int, images: int) -> Any:
    model = FakeLVLM()

    async def ask(system: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
        content: list[Any] = [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts
        ]
        return json.loads((await model.ainvoke([SystemMessage(system), HumanMessage(content)])).text)

    def paint(seed: int) -> Any:
        file = io.BytesIO()
        picture(seed).save(file, "PNG", compress_level=1)
        if name != "saver_refs":
            return file.getvalue()
        sha256 = hashlib.sha256(file.getvalue()).hexdigest()
        (folder / f"{sha256}.png").write_bytes(file.getvalue())
        return sha256

    async def generate(state: _State) -> dict[str, Any]:
        seeds = [state["seed"] * 10_000 + state["round"] * images + index for index in range(images)]
        return {"images": [await asyncio.to_thread(paint, seed) for seed in seeds]}

    async def critique(state: _State) -> dict[str, Any]:
        async def one(image: Any) -> dict[str, Any]:
            data = (folder / f"{image}.png").read_bytes() if isinstance(image, str) else image
            url = {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
            return await ask(
                "Judge it.", f"{_REQUEST}", {"type": "image_url", "image_url": url}, "What is it?"
            )

        read = await asyncio.gather(*map(one, state["images"]))
        for it in read:
            it["reward"] = 1 - (abs(float(it["valence"]) - 2) + abs(float(it["arousal"]) + 1)) / 6
        done = {"prompt": state["prompt"], "images": state["images"], "critiques": read}
        return {"history": [*state["history"], done]}

    async def rewrite(state: _State) -> dict[str, Any]:
        said = await ask("Rewrite it.", json.dumps([it["critiques"] for it in state["history"]]))
        return {"prompt": said["prompt"], "round": state["round"] + 1}

    graph = StateGraph(_State)
    for node in (generate, critique, rewrite):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "generate")
    graph.add_edge("generate", "critique")
    graph.add_conditional_edges("critique", lambda s: "rewrite" if s["round"] + 1 < rounds else END)
    graph.add_edge("rewrite", "generate")
    saver = None
    if name != "bare":
        saver = AsyncSqliteSaver.from_conn_string(str(folder / "checkpoints.db"))
        saver = await stack.enter_async_context(saver)
    compiled: Any = graph.compile(saver)

    async def run(seed: int) -> None:
        begin = {"prompt": _REQUEST[0], "seed": seed, "round": 0, "history": []}
        config = {"configurable": {"thread_id": str(seed)}, "recursion_limit": 4 * rounds}
        await compiled.ainvoke(begin, config)

    return run
