"""kill -9 of a server with runs, a job and watchers: what was begun ends, and nobody misses or doubles an event."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from service_parts import API, REQUEST, settings_of

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from emoloop.service.jobs import JobRequest, Jobs, environment
from emoloop.traces.store import open_store
from faults import served

SERVER = Path(__file__).with_name("served.py")
RUNS, WATCHERS, KILLS = 8, 50, 2


class Server:
    """A process that is started again on the same port after it was killed."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.url, self._home = f"http://127.0.0.1:{self.port}", home

    async def start(self, client: httpx.AsyncClient) -> None:
        line = [sys.executable, str(SERVER), str(self._home), str(self.port)]
        self.process = subprocess.Popen(line)  # noqa: ASYNC220
        for _ in range(1200):
            assert self.process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{self.url}/readyz")).is_success:
                    return
            await asyncio.sleep(0.1)
        raise AssertionError("no server")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Watcher:
    """Follows a stream to its end as a browser does: after a break it goes on from the last id."""

    def __init__(self, url: str, last: str) -> None:
        self.url, self.last, self.ids, self.texts = url, last, [], []

    async def follow(self, client: httpx.AsyncClient) -> str:
        while True:
            headers = {"Last-Event-ID": self.ids[-1]} if self.ids else {}
            with contextlib.suppress(httpx.TransportError):
                async with client.stream("GET", self.url, headers=headers) as response:
                    if response.status_code == 204:
                        return self.last
                    if response.is_success and await self._read(response):
                        return self.last
            await asyncio.sleep(0.1)

    async def _read(self, response: httpx.Response) -> bool:
        message: dict[str, str] = {}
        async for line in response.aiter_lines():
            key, _, value = line.partition(": ")
            if key in ("id", "event", "data"):
                message[key] = message[key] + "\n" + value if key in message else value
            elif not line and message:
                if "id" in message:
                    self.ids.append(message["id"])
                    self.texts.append(message["data"])
                elif message["event"] == "state":
                    self.last = message["data"]
                message = {}
        return self.last in ("completed", "done", "failed")


async def test_a_killed_server_loses_nothing(tmp_path):
    home = tmp_path / "home"
    settings = settings_of(home)
    server = Server(home)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
        await server.start(client)
        try:
            answers = [
                await client.post(f"{server.url}{API}/runs", json={**REQUEST, "seed": n, "rounds": 3})
                for n in range(RUNS)
            ]
            runs = [it.json()["run_id"] for it in answers]
            job = (await client.post(f"{server.url}{API}/jobs", json={"kind": "distill"})).json()["id"]
            watchers = [
                Watcher(f"{server.url}{API}/runs/{runs[n % RUNS]}/watch", "") for n in range(WATCHERS)
            ]
            log = Watcher(f"{server.url}{API}/jobs/{job}/log", "")
            following = [asyncio.create_task(it.follow(client)) for it in (*watchers, log)]
            heard = 0
            for kill in range(KILLS):
                while sum(len(it.ids) for it in watchers) < heard + 2 * WATCHERS or len(log.ids) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                server.kill()
                heard = sum(len(it.ids) for it in watchers)
                if kill == KILLS - 1:
                    (home / "go").touch()
                await server.start(client)
            states = await asyncio.wait_for(asyncio.gather(*following), 300)
        finally:
            server.process.terminate()
            server.process.wait()
    assert states == ["completed"] * WATCHERS + ["done"]
    with open_store(settings) as store:
        for place, watcher in enumerate(watchers):
            events = store.events(runs[place % RUNS])
            assert [event.seq for event in events] == list(range(len(events)))
            assert watcher.ids == [str(event.cursor) for event in events]
        everything = store.tail(0, 10_000)
        assert max(Counter(event.key for event in everything).values()) == 1
        [item] = store.queue.items([job])
        assert item.state == "done"
    said = [line for line in "\n".join(log.texts).splitlines() if line.startswith("step")]
    # The job did not notice: its supervisor outlives the server.
    assert item.attempts == 1 and said == [f"step {n}" for n in range(40)]


def test_a_job_whose_supervisor_is_killed_goes_on(tmp_path):
    """The next look of any server queues it again, and it goes on from what it had saved."""
    settings = settings_of(tmp_path / "home")
    with open_store(settings) as store:
        jobs = Jobs(settings, store)
        job = jobs.start(JobRequest.model_validate({"kind": "distill"}), None).id
        log = jobs.folder(job) / "log.txt"

        def supervise() -> subprocess.Popen[bytes]:
            with log.open("ab") as out:
                return subprocess.Popen(
                    [sys.executable, "-c", served.SUPERVISE.format(job=served.JOB), job],
                    stdout=out,
                    stderr=out,
                    env={**os.environ, **environment(settings)},
                )

        first = supervise()
        while b"step 2" not in log.read_bytes():
            assert first.poll() is None
        first.kill()
        first.wait()
        store.queue.reap()
        assert store.queue.items([job])[0].state == "queued"
        assert supervise().wait(120) == 0
        [item] = store.queue.items([job])
        assert (item.state, item.attempts) == ("done", 2)
        steps = [line for line in log.read_text().splitlines() if line.startswith("step")]
        assert steps[-1] == "step 39" and set(steps) == {f"step {n}" for n in range(40)}
