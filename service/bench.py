"""How fast a server answers over a large log, and how far watchers of live runs are behind.

The server is a process of its own and is asked through its socket, as a browser does; generator and LVLM take a fixed
time. What is measured is wall time, and the server's own processor time beside it: that is what a busy machine leaves
comparable.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from ..domain import Critique, EmotionTarget, RunStatus, StopReason
from ..evals.bench.fakes import FakeGenerator, FakeLVLM, picture
from ..events import Critiqued, Event, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from ..graph.loop import open_loop
from ..settings import Settings, load_settings
from ..traces.store import TraceStore, open_store
from .server import config_of
from .work import Service

#: Runs in one transaction while the log is filled.
_BATCH = 50

#: Seconds that a batch of pictures takes, and an answer of the LVLM.
_IMAGES, _LVLM = 0.2, 0.1

_API = "/api/v1"


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


def serve() -> None:
    """The server's process: prints its port; then for each line its processor seconds and its largest size in MB."""
    settings = Settings.model_validate_json(sys.argv[1])
    loop = open_loop(settings, generator=FakeGenerator(_IMAGES), lvlm=FakeLVLM(seconds=_LVLM))
    server = uvicorn.Server(config_of(Service(settings, loop=loop)))

    def answer() -> None:
        while not server.started:
            time.sleep(0.05)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        for _ in sys.stdin:
            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(time.process_time(), size, flush=True)
        server.should_exit = True

    threading.Thread(target=answer, daemon=True).start()
    server.run()


class _Server:
    """A server on a log; to be entered."""

    def __init__(self, settings: Settings) -> None:
        code = f"from {__name__} import serve; serve()"
        line = [sys.executable, "-c", code, settings.model_dump_json()]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def __enter__(self) -> _Server:
        self.port = int(self._out.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._process.wait(60)
        self._out.close()

    def used(self) -> tuple[float, float]:
        """Processor seconds until now, and MB at most."""
        print(file=self._in, flush=True)
        cpu, size = self._out.readline().split()
        return float(cpu), float(size)


async def _ask(
    server: _Server, client: httpx.AsyncClient, name: str, url: Callable[[int], str], count: int
) -> dict[str, float]:
    """Milliseconds that 95 of 100 answers take at most, and of the server's processor that one takes."""
    times, (before, _) = [], server.used()
    for number in range(count):
        times.append(await _timed(client, url(number)))
    cpu = server.used()[0] - before
    return {f"{name}_p95_ms": _p(times, 95), f"{name}_cpu_ms": 1000 * cpu / count}


async def _timed(client: httpx.AsyncClient, url: str) -> float:
    began = time.perf_counter()
    answer = await client.get(url, headers={"Accept": "text/html"})
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - began


def _p(seconds: list[float], percent: float) -> float:
    return 1000 * float(np.percentile(seconds, percent))


class _Watcher:
    """Follows a run's events through a socket of its own, with no library's time in between."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.ids: list[int] = []
        self.late: list[float] = []

    async def follow(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        writer.write(f"GET {_API}/runs/{self.run_id}/watch HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        begun = datetime.now(UTC)
        # A chunk of the answer is one message, and its length stands on a line of its own.
        async for line in reader:
            if line.startswith(b"id: "):
                self.ids.append(int(line[4:]))
            elif b'"time":"' in line:
                said = line.partition(b'"time":"')[2].partition(b'"')[0].decode()
                if (then := datetime.fromisoformat(said)) > begun:
                    self.late.append((datetime.now(UTC) - then).total_seconds())
            elif line.startswith(b"data: completed"):
                break
        writer.close()


async def _watch(
    server: _Server, client: httpx.AsyncClient, watchers: int, live: int, rounds: int, images: int
) -> dict[str, float]:
    """Watchers of live runs: how late, what is lost, what comes twice; and what the API takes meanwhile."""
    wanted = {"prompt": "a dog by the sea", "target": {"valence": 2.0}, "rounds": rounds, "images": images}
    before, _ = server.used()
    answers = await asyncio.gather(
        *(client.post(f"{_API}/runs", json={**wanted, "seed": n}) for n in range(live))
    )
    names = [it.json()["run_id"] for it in answers]
    watching = [_Watcher(names[place % live]) for place in range(watchers)]
    tasks = [asyncio.create_task(it.follow(server.port)) for it in watching]
    times: list[float] = []
    urls = [f"{_API}/runs", "/", *(f"{page}/{names[0]}" for page in (f"{_API}/runs", "/runs"))]
    while not all(it.done() for it in tasks):
        times.append(await _timed(client, urls[len(times) % len(urls)]))
        await asyncio.sleep(0.02)
    await asyncio.gather(*tasks)
    cpu = server.used()[0] - before
    log: dict[str, list[int]] = {}
    for name in names:
        watch = await client.get(f"{_API}/runs/{name}/watch")
        log[name] = [int(line[4:]) for line in watch.text.splitlines() if line.startswith("id: ")]
    late = [seconds for it in watching for seconds in it.late]
    return {
        "watchers": watchers,
        "watcher_lag_p99_ms": _p(late, 99),
        "watcher_lag_most_ms": _p(late, 100),
        "events_lost": sum(len(set(log[it.run_id]) - set(it.ids)) for it in watching),
        "events_doubled": sum(len(it.ids) - len(set(it.ids)) for it in watching),
        "events_told": sum(len(it.ids) for it in watching),
        "live_p95_ms": _p(times, 95),
        "live_cpu_s": cpu,
    }


async def main(
    runs: int = 10_000,
    rounds: int = 3,
    images: int = 4,
    requests: int = 100,
    watchers: int = 200,
    live: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill a log, ask a server for pages of it, and watch runs that it works on.

    Args:
        runs: In the log.
        rounds: Of each, and of the live ones.
        images: Pictures in a round.
        requests: Pages of each kind that are asked for.
        watchers: At a time.
        live: Runs that they watch.
        seed: Of what is in the log.
    """
    with tempfile.TemporaryDirectory(prefix="emoloop-serve-") as home:
        service = {"port": 0, "jobs": 0, "runs": live}
        loop = {"tolerance": 0.0, "exhaust": True}
        settings = load_settings({"home": Path(home), "service": service, "loop": loop})
        began = time.perf_counter()
        with open_store(settings) as store:
            shas = _fill(store, runs, rounds, images, seed)
        print(f"{runs} runs written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        asked = ("", "sort=gain", "q=house", "state=completed&sort=reward", "q=warm")
        figures: dict[str, float] = {}
        with _Server(settings) as server:
            base = f"http://127.0.0.1:{server.port}"
            async with httpx.AsyncClient(base_url=base, timeout=120, trust_env=False) as client:
                for name, url in (
                    ("list", lambda n: f"/?{asked[n % len(asked)]}"),
                    ("run", lambda n: f"/runs/bench-{n * 7919 % runs:06}"),
                    ("thumbnail", lambda n: f"{_API}/images/{shas[n % len(shas)]}/thumbnail"),
                ):
                    figures |= await _ask(server, client, name, url, requests)
                figures |= await _watch(server, client, watchers, live, rounds, images)
            figures["server_mb"] = server.used()[1]
    return {"figures": figures, "n": runs}
