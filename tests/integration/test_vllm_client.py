"""The client of vLLM servers against a real socket: failures, patience, several servers."""

import asyncio
import gzip
import logging
import threading
import time

import pytest
from emoloop.domain import UserError
from emoloop.tools.lvlm import vllm as vllm_client
from emoloop.tools.lvlm.vllm import LVLMUnavailable, VLLMChat
from fake_openai import CERTIFICATE, chat, drip, error, hang, serving
from pydantic import SecretStr

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
            VLLMChat(**{"model": "tiny", "base_url": urls, "timeout": 60.0, "patience": 60.0, **options})
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
    assert time.monotonic() - started >= 0.6


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


async def test_an_answer_that_drips_is_given_up(server, connect):
    server.script = lambda number, body: drip()
    with pytest.raises(LVLMUnavailable, match=r"hangs: no answer in 0\.2 s"):
        await connect(server, timeout=0.2, patience=0.3).ainvoke("x")


async def test_a_connection_that_is_reset_is_tried_again(server, connect):
    server.script = lambda number, body: server.reset() if number < 2 else chat("whole")
    assert (await connect(server).ainvoke("x")).content == "whole"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "body", [b'{"choices": [{"mess', b'{"choices": []}', b"[" * 100_000, b"<html>502</html>", b"null"]
)
async def test_unreadable_bodies_are_retried(server, connect, body):
    server.script = lambda number, _: (200, {}, body) if number < 2 else chat("whole")
    assert (await connect(server).ainvoke("x")).content == "whole"


async def test_an_answer_is_unpacked_to_a_limit(server, connect):
    packed = gzip.compress(bytes(2**25), 9)
    server.script = lambda number, body: (200, {"content-encoding": "gzip"}, packed)
    with pytest.raises(LVLMUnavailable, match=r"unreadable answers.*longer than"):
        await connect(server).ainvoke("x")


async def test_lasting_unreadable_and_cut_bodies(server, connect):
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
        first.script = lambda number, body: chat("before")
        assert (await model.ainvoke("x")).content == "before"
        killed = threading.Event()
        first.script = lambda number, body: killed.wait() and None
        waiting = [asyncio.create_task(model.ainvoke("x")) for _ in range(16)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(first.kill)
        killed.set()
    await asyncio.sleep(0.3)
    with serving(port):  # asked before a script could be given to it
        answers = await asyncio.gather(*waiting)
    assert {message.content for message in answers} == {"ok"}


async def test_without_a_restart_the_end_is_near_for_all(connect, monkeypatch):
    asked = []
    receive = vllm_client.receive
    monkeypatch.setattr(vllm_client, "receive", lambda *words: asked.append(1) or receive(*words))
    with serving() as gone:
        model = connect(gone, patience=0.5, concurrency=2)
        await model.ainvoke("x")
    started = time.monotonic()
    results = await asyncio.gather(*(model.ainvoke("x") for _ in range(32)), return_exceptions=True)
    assert all(isinstance(r, LVLMUnavailable) and "no LVLM server at" in str(r) for r in results)
    assert 0.4 < time.monotonic() - started < 32 * 0.5 / 2  # not each its patience over 2 slots
    asked.clear()
    with pytest.raises(LVLMUnavailable):
        await model.ainvoke("x")
    assert len(asked) == 1  # the patience is used up: one try


async def test_the_least_busy_server_is_asked_and_a_dead_one_left_alone(connect):
    all_there, release = threading.Barrier(7), threading.Event()

    def script(number, body):
        if not release.is_set():
            all_there.wait(60)
            release.wait(60)
        return chat("ok")

    with serving() as a, serving() as b, serving() as c:
        servers = [a, b, c]
        for each in servers:
            each.script = script
        model = connect(*servers)
        held = [asyncio.create_task(model.ainvoke("x")) for _ in range(6)]
        await asyncio.to_thread(all_there.wait, 60)
        assert [len(s.requests) for s in servers] == [2, 2, 2]
        release.set()
        await asyncio.gather(*held)
        await asyncio.to_thread(b.kill)
        answers = await asyncio.gather(*(model.ainvoke("x") for _ in range(24)))
        assert {answer.content for answer in answers} == {"ok"}
        assert len(b.requests) == 2


async def test_the_load_is_spread(connect):
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
    connect(server).check(images=False)
    server.script = lambda number, body: error(500, "broken")
    with pytest.raises(UserError, match="broken"):
        connect(server).check()
    with pytest.raises(UserError, match=r"no LVLM server at .*emoloop lvlm serve tiny"):
        connect("http://127.0.0.1:9/v1").check()


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, "busy", {"retry-after": "0.1"}),
        error(503, "loading"),
        (200, {}, b"<html>soon</html>"),
        (200, {}, b'{"data": ['),
        (200, {}, b'{"data": [{}]}'),
    ],
)
def test_a_check_waits_as_a_run_does(server, connect, trouble):
    names = server.greet
    server.greet = lambda number: trouble if number < 2 else names(number)
    connect(server).check()
    assert server.greeted == 3
    server.greet = lambda number: trouble
    with pytest.raises(UserError, match=r"overloaded|answered 503|unreadable") as refused:
        connect(server, patience=0.3).check()
    assert "\n" not in str(refused.value)


def test_of_several_servers_one_with_the_right_model_suffices(server, connect):
    with serving(models=("other",)) as other:
        connect(other, server).check()
        connect(server, other).check()
        with pytest.raises(UserError, match="serves 'other', not 'tiny'"):
            connect(other, other).check()


def test_an_address_nearly_right_is_understood_or_told_what_it_lacks(server, connect):
    bare = server.url.removesuffix("/v1")
    with pytest.raises(UserError, match="usually ends in /v1"):
        connect(bare).check()
    connect(server.url.removeprefix("http://")).check()
    connect(server.url + "/").check()
    with pytest.raises(UserError, match="does it speak http://"):
        connect(server.url.replace("http:", "https:")).check()
    for none in ("", " , ", "ftp://127.0.0.1/v1", "http://", "http://127.0.0.1:port/v1", "http://[::1/v1"):
        with pytest.raises(UserError, match=r"lvlm\.base_url"):
            connect(none).check()


def test_a_certificate_of_ones_own(connect, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serving(tls=True) as secret:
        with pytest.raises(UserError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            connect(secret).check()
        with pytest.raises(UserError, match="does it speak https://"):
            connect(secret.url.replace("https:", "http:")).check()
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        connect(secret).check()


def test_the_key_is_sent_without_its_line_end(server, connect):
    connect(server, api_key=SecretStr(" secret\n")).check()
    assert server.keys == ["Bearer secret"]
    connect(server, api_key=SecretStr("\n")).check()
    assert server.keys[-1] is None
    with pytest.raises(UserError, match="API key") as refused:
        connect(server, api_key=SecretStr("sec\nret")).check()
    assert "sec" not in str(refused.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SSL_CERT_FILE": "/nowhere/ca.pem"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": ""},
        {"OPENAI_PROXY": "http://127.0.0.1:9", "OPENAI_BASE_URL": "http://127.0.0.1:9"},
    ],
)
def test_the_machines_network_settings_are_not_for_this_machine(server, connect, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)
    connect(server).check()


def test_network_settings_that_cannot_be_used_are_named(connect, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(UserError, match=r"no connection to http://example\.test/v1.*SSL_CERT_FILE"):
        connect("http://example.test/v1").check()


async def test_a_password_in_the_address_is_never_shown(server, connect):
    url = server.url.replace("http://", "http://ann:s3cret@")
    connect(url).check()
    assert server.keys[-1].startswith("Basic ")
    server.script = lambda number, body: error(400, "no")
    await asyncio.to_thread(server.kill)
    for failing in (connect(url, patience=0.1).ainvoke("x"), asyncio.to_thread(connect(url).check)):
        with pytest.raises((LVLMUnavailable, UserError)) as failed:
            await failing
        assert "s3cret" not in str(failed.value)
        assert "***@127.0.0.1" in str(failed.value)


async def test_waiting_is_said_once(server, connect, monkeypatch, caplog):
    monkeypatch.setattr(vllm_client, "SAY", 0.0)
    server.script = lambda number, body: error(503, "loading") if number < 12 else chat("ok")
    model = connect(server)
    with caplog.at_level(logging.WARNING):
        await asyncio.gather(*(model.ainvoke("x") for _ in range(6)))
    [record] = caplog.records
    assert f"the LVLM server at {server.url} answered 503" in record.getMessage()
    assert "waiting up to 60 s" in record.getMessage()


def test_check_takes_a_folder_for_its_name(connect, tmp_path):
    with serving(models=(str(tmp_path),)) as server:
        model = connect(server, model=str(tmp_path) + "/")
        model.check()
        model.invoke("x")
        assert server.requests[-1]["model"] == str(tmp_path)


async def test_a_cancelled_caller_frees_its_slot(server, connect):
    arrived, release = asyncio.Event(), threading.Event()
    tell = asyncio.get_running_loop().call_soon_threadsafe

    def script(number, body):
        if "slow" in str(body):
            tell(arrived.set)
            release.wait(60)
        return chat("ok")

    server.script = script
    model = connect(server, concurrency=1)
    task = asyncio.create_task(model.ainvoke("slow"))
    await arrived.wait()
    task.cancel()
    assert (await model.ainvoke("y")).content == "ok"
    assert not release.is_set()
    release.set()


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
