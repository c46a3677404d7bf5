"""How fast the pages are over a large log, and how far watchers are behind."""

from __future__ import annotations

import asyncio
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ..domain import Critique, EmotionTarget, RunStatus, StopReason
from ..evals.bench.fakes import picture
from ..events import Critiqued, Event, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from ..settings import load_settings
from ..traces.store import TraceStore
from .app import create_app
from .work import Service

#: Runs in one transaction while the log is filled.
_BATCH = 50

#: What is written to a live run.
_GENERATED = ImageGenerated(
    run_id="", sha256="0" * 64, prompt="a dog", seed=1, model="fake", height=96, width=96
)


def _events(
    run_id: str, rounds: int, images: int, shas: list[str], random: np.random.Generator
) -> Iterator[Event]:
    subject = ("dog", "cat", "house", "boat")[int(random.integers(4))]
    target = EmotionTarget(valence=round(float(random.uniform(-3, 3)), 1), arousal=0.0)
    prompt = f"a {subject} by the sea"
    yield RunStarted(run_id=run_id, prompt=prompt, target=target, seed=1)
    for number in range(rounds):
        if number:
            prompt += " in warm light"
            about: dict[str, Any] = {
                "changes": "light",
                "why": "warmer",
                "model": "fake",
                "prompt_version": "1",
            }
            yield Rewritten(run_id=run_id, round=number, prompt=prompt, **about)
        for index in range(images):
            place: dict[str, Any] = {"run_id": run_id, "round": number, "index": index}
            place["sha256"] = shas[int(random.integers(len(shas)))]
            valence, reward = random.uniform(-3, 3), random.uniform(0, 1)
            critique = Critique(
                valence=valence, arousal=0.5, alignment=1, analysis="Soft spots of many colours."
            )
            yield ImageGenerated(
                **place, prompt=prompt, seed=index, model="fake", height=96, width=96, seconds=0.1
            )
            yield Critiqued(**place, critique=critique, model="fake", prompt_version="1", seconds=0.1)
            yield Rewarded(**place, name="emotion", version="1", value=reward)
    yield RunFinished(run_id=run_id, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED)


def _fill(store: TraceStore, runs: int, rounds: int, images: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    shas = [store.blobs.put_image(picture(number)) for number in range(64)]
    for first in range(0, runs, _BATCH):
        names = (f"bench-{number:06}" for number in range(first, min(first + _BATCH, runs)))
        store.append(*(event for name in names for event in _events(name, rounds, images, shas, random)))
    return shas


async def _ask(
    client: httpx.AsyncClient, name: str, url: Callable[[int], str], count: int
) -> dict[str, float]:
    """Milliseconds that 95 of 100 answers take at most, and of the processor that one takes."""
    times, cpu = [], time.process_time()
    for number in range(count):
        began = time.perf_counter()
        answer = await client.get(url(number), headers={"Accept": "text/html"})
        times.append(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text
    cpu = time.process_time() - cpu
    return {f"{name}_p95_ms": 1000 * float(np.percentile(times, 95)), f"{name}_cpu_ms": 1000 * cpu / count}


async def _watch(service: Service, watchers: int, live: int, events: int) -> dict[str, float]:
    """Watchers of live runs, each in step with the log: how late, what is lost, what comes twice."""
    names = [f"live-{number}" for number in range(live)]
    started = [
        RunStarted(run_id=name, prompt="a dog", target=EmotionTarget(valence=1.0), seed=1) for name in names
    ]
    last = (await asyncio.to_thread(service.store.append, *started))[-1].cursor
    written: dict[int, float] = {}
    late: list[float] = []
    heard: list[list[int]] = [[] for _ in range(watchers)]

    async def watch(place: int) -> None:
        async for batch in service.feed.follow(last, names[place % live]):
            now = time.perf_counter()
            for event in batch:
                heard[place].append(event.seq)
                late.append(now - written.get(event.cursor, now))
            if len(heard[place]) >= events:
                return

    tasks = [asyncio.create_task(watch(place)) for place in range(watchers)]
    for number in range(events):
        batch = [_GENERATED.model_copy(update={"run_id": name, "index": number}) for name in names]
        stand = await asyncio.to_thread(service.store.append, *batch)
        written |= dict.fromkeys((event.cursor for event in stand), time.perf_counter())
        await asyncio.sleep(0.05)
    await asyncio.wait(tasks, timeout=10)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    wanted = set(range(1, events + 1))
    return {
        "watchers": watchers,
        "watcher_lag_p99_ms": 1000 * float(np.percentile(late, 99)),
        "events_lost": sum(len(wanted - set(seqs)) for seqs in heard),
        "events_doubled": sum(len(seqs) - len(set(seqs)) for seqs in heard),
    }


async def main(
    runs: int = 10_000,
    rounds: int = 3,
    images: int = 4,
    requests: int = 100,
    watchers: int = 200,
    live: int = 16,
    events: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill a log, ask for pages in this process, and watch runs that are being written.

    Args:
        runs: In the log.
        rounds: Of each.
        images: Pictures in a round.
        requests: Pages of each kind that are asked for.
        watchers: At a time.
        live: Runs that they watch.
        events: Written to each of these, one every 50 ms.
        seed: Of what is in the log.
    """
    with tempfile.TemporaryDirectory(prefix="emoloop-serve-") as home:
        service = Service(load_settings({"home": Path(home)}), models=False)
        async with service:
            began = time.perf_counter()
            shas = await asyncio.to_thread(_fill, service.store, runs, rounds, images, seed)
            print(f"{runs} runs written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                asked = ("", "sort=gain", "q=house", "state=completed&sort=reward", "q=warm")
                figures: dict[str, float] = {}
                for name, url in (
                    ("list", lambda n: f"/?{asked[n % len(asked)]}"),
                    ("run", lambda n: f"/runs/bench-{n * 7919 % runs:06}"),
                    ("thumbnail", lambda n: f"/api/v1/images/{shas[n % len(shas)]}/thumbnail"),
                ):
                    figures |= await _ask(client, name, url, requests)
            figures |= await _watch(service, watchers, live, events)
        figures["server_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"figures": figures, "n": runs}
