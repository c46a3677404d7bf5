"""The client of vLLM servers against a real socket: failures, patience, several servers."""

import asyncio
import threading
import time

import pytest
from emoloop.domain import UserError
from emoloop.tools.lvlm import vllm as vllm_client
from emoloop.tools.lvlm.vllm import LVLMUnavailable, VLLMChat
from fake_openai import chat, error, hang, serving

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST", 0.02)
    monkeypatch.setattr(vllm_client, "CAP", 0.1)


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def connect():
    made = []

    def make(*servers, **options):
        urls = ",".join(s if isinstance(s, str) else s.url for s in servers)
        made.append(
            VLLMChat(**{"model": "tiny", "base_url": urls, "timeout": 2.0, "patience": 3.0, **options})
        )
        return made[-1]

    yield make
    for model in made:
        model.close()


async def test_asks_as_openai_does(server, connect):
    model = connect(server, temperature=0.3, max_tokens=77)
    message = await model.bind(response_format=SCHEMA, seed=5).ainvoke("hello")
    assert message.content == "ok"
    assert message.usage_metadata["input_token_details"] == {"cache_read": 8}
    [body] = server.requests
    assert body["response_format"]["json_schema"]["schema"]["x-guidance"]["item_separator"] == ", "
    assert (body["temperature"], body["seed"]) == (0.3, 5)
    assert body.get("max_tokens", body.get("max_completion_tokens")) == 77


def test_works_across_event_loops_and_in_none(server, connect):
    model = connect(server)
    assert model.invoke("a").content == "ok"
    for _ in range(2):
        assert asyncio.run(model.ainvoke("b")).content == "ok"
    assert server.connections == 1


async def test_concurrency_and_connections_are_bounded(server, connect):
    server.script = lambda number, body: (time.sleep(0.02), chat("ok"))[1]
    model = connect(server, concurrency=4)
    await asyncio.gather(*(model.ainvoke("x") for _ in range(40)))
    assert 2 <= server.most_at_once <= 4
    assert server.connections <= 8


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
async def test_passing_trouble_is_retried(server, connect, status):
    server.script = lambda number, body: error(status, "not now") if number < 2 else chat("at last")
    assert (await connect(server).ainvoke("x")).content == "at last"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_a_wrong_request_is_not_retried(server, connect, status):
    server.script = lambda number, body: error(status, "the model `tiny` is unknown")
    with pytest.raises(LVLMUnavailable, match="is unknown"):
        await connect(server).ainvoke("x")
    assert len(server.requests) == 1


async def test_retry_after_is_honoured(server, connect):
    server.script = lambda number, body: (
        error(429, "busy", {"retry-after": "0.6"}) if number == 0 else chat("ok")
    )
    started = time.monotonic()
    await connect(server).ainvoke("x")
    assert 0.6 <= time.monotonic() - started < 2


async def test_a_lasting_500_ends_after_some_tries(server, connect):
    server.script = lambda number, body: error(500, "engine says no")
    with pytest.raises(LVLMUnavailable, match=r"500.*engine says no"):
        await connect(server).ainvoke("x")
    assert len(server.requests) == vllm_client.TRIES_AT_500


async def test_a_lasting_429_ends_with_the_patience(server, connect):
    server.script = lambda number, body: error(429, "full")
    with pytest.raises(LVLMUnavailable, match=r"overloaded \(429\)"):
        await connect(server, patience=0.3).ainvoke("x")


async def test_a_hanging_server_is_given_up(server, connect):
    server.script = lambda number, body: hang(1.0)
    with pytest.raises(LVLMUnavailable, match=r"hangs: no answer in 0\.1 s"):
        await connect(server, timeout=0.1, patience=0.25).ainvoke("x")


async def test_unreadable_and_cut_bodies(server, connect):
    server.script = lambda number, body: (200, {}, b'{"choices": [{"mess') if number < 2 else chat("whole")
    assert (await connect(server).ainvoke("x")).content == "whole"
    server.script = lambda number, body: (200, {}, b"{}")
    with pytest.raises(LVLMUnavailable, match="unreadable"):
        await connect(server).ainvoke("x")
    server.script = lambda number, body: (200, {"content-length": "5000"}, b'{"choices": [')
    with pytest.raises(LVLMUnavailable):
        await connect(server, timeout=0.2, patience=0.3).ainvoke("x")


async def test_a_restart_costs_only_time(connect):
    with serving() as first:
        port = first.server_port
        model = connect(first, patience=20)
        assert (await model.ainvoke("x")).content == "ok"
        first.script = lambda number, body: hang(0.2)
        waiting = [asyncio.create_task(model.ainvoke("x")) for _ in range(16)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(first.kill)
    await asyncio.sleep(0.3)
    with serving(port) as second:
        second.script = lambda number, body: chat("again")
        answers = await asyncio.gather(*waiting)
    assert {message.content for message in answers} == {"again"}


async def test_without_a_restart_the_end_is_near_for_all(connect):
    with serving() as gone:
        model = connect(gone, patience=0.5, concurrency=2)
        await model.ainvoke("x")
    started = time.monotonic()
    results = await asyncio.gather(*(model.ainvoke("x") for _ in range(32)), return_exceptions=True)
    first = time.monotonic() - started
    assert all(isinstance(r, LVLMUnavailable) and "no LVLM server at" in str(r) for r in results)
    assert 0.4 < first < 3  # not 32 times the patience over 2 slots
    started = time.monotonic()
    with pytest.raises(LVLMUnavailable):
        await model.ainvoke("x")
    assert time.monotonic() - started < 0.3  # the patience is used up: one try


async def test_a_run_stays_with_one_server_and_moves_when_it_dies(connect):
    with serving() as a, serving() as b, serving() as c:
        servers = [a, b, c]
        model = connect(*servers)

        async def run(name):
            before = [len(s.requests) for s in servers]
            for _ in range(4):
                await model.ainvoke("x", config={"metadata": {"run_id": name}})
            return [len(s.requests) - n for s, n in zip(servers, before, strict=True)]

        places = {}
        for name in map(str, range(48)):  # the ports, so the places, are chance: 48 leave no server out
            counts = await run(name)
            assert sorted(counts) == [0, 0, 4]
            places[name] = counts.index(4)
        assert len(set(places.values())) == 3
        await asyncio.to_thread(servers[1].kill)
        for name, place in places.items():
            counts = await run(name)
            assert counts[1] == 0
            if place != 1:
                assert counts[place] == 4  # the others stay where they were


async def test_without_a_run_the_load_is_spread(connect):
    with serving() as a, serving() as b:
        for s in (a, b):
            s.script = lambda number, body: (time.sleep(0.02), chat("ok"))[1]
        model = connect(a, b)
        await asyncio.gather(*(model.ainvoke("x") for _ in range(20)))
        assert abs(len(a.requests) - len(b.requests)) <= 4


def test_check(server, connect):
    connect(server).check()
    with pytest.raises(UserError, match=r"serves 'tiny', not 'huge'.*lvlm serve huge"):
        connect(server, model="huge").check()
    server.script = lambda number, body: error(400, "At most 0 image(s) may be provided")
    with pytest.raises(UserError, match="takes no images"):
        connect(server).check()
    server.script = lambda number, body: error(500, "broken")
    with pytest.raises(UserError, match="broken"):
        connect(server).check()
    with pytest.raises(UserError, match=r"no LVLM server answers.*emoloop lvlm serve tiny"):
        connect("http://127.0.0.1:9/v1").check()


def test_check_takes_a_folder_for_its_name(connect, tmp_path):
    with serving(models=(str(tmp_path),)) as server:
        model = connect(server, model=str(tmp_path) + "/")
        model.check()
        model.invoke("x")
        assert server.requests[-1]["model"] == str(tmp_path)


async def test_a_cancelled_caller_frees_its_slot(server, connect):
    arrived = asyncio.Event()
    tell = asyncio.get_running_loop().call_soon_threadsafe

    def script(number, body):
        if "slow" not in str(body):
            return chat("ok")
        tell(arrived.set)
        return hang(2.0)

    server.script = script
    model = connect(server, concurrency=1, timeout=60)
    task = asyncio.create_task(model.ainvoke("slow"))
    await arrived.wait()
    started = time.monotonic()
    task.cancel()
    assert (await model.ainvoke("y")).content == "ok"
    assert time.monotonic() - started < 1.8


def test_close_leaves_nothing(server, connect):
    model = connect(server)
    model.invoke("x")
    model.close()
    model.close()
    deadline = time.monotonic() + 2
    while any(t.name == "emoloop-vllm" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name == "emoloop-vllm" for t in threading.enumerate())
    assert model.invoke("x").content == "ok"
