"""The real vLLM: server, a server of one's own and the embedded engine say the same on the same weights."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import psutil
import pytest
import tiny
import tiny_lvlm
from emoloop import EmotionTarget, open_loop
from emoloop.agents.prompt import load_prompt
from emoloop.agents.schemas import CRITIC_SCHEMA, REWRITER_SCHEMA, CriticAnswer, response_format
from emoloop.agents.scorer import Scorer
from emoloop.domain import UserError
from emoloop.settings import LVLMSettings
from emoloop.tools.lvlm.chat import image_url
from emoloop.tools.lvlm.load import load_lvlm
from emoloop.tools.lvlm.scores import read_scores, score_only
from emoloop.tools.lvlm.vllm import LVLMUnavailable
from emoloop.tools.vllm.server import VLLMServer, metrics, prefix_hits
from langchain_core.messages import HumanMessage
from PIL import Image

CRITIC = response_format("critique", CRITIC_SCHEMA)
LIMIT = 320  # random weights ramble


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.NEAREST)


def questions(count: int, prompt: str = "critic-compact"):
    template = load_prompt(prompt)
    return [
        template.messages((image_url(picture(i)),), prompt=f"a dog {i}", target="valence +2.0 arousal -1.0")
        for i in range(count)
    ]


def settings(engine: str, folder, server=None, python=None, **more) -> LVLMSettings:
    url = {"base_url": server.url} if server else {}
    path = {"vllm_python": str(python)} if python else {}
    return LVLMSettings(engine=engine, model=str(folder), max_tokens=LIMIT, **url, **path, **more)  # pyright: ignore


@pytest.fixture
def chat(server, folder):
    model = load_lvlm(settings("vllm", folder, server))
    yield model
    model.close()  # pyright: ignore


@pytest.fixture(scope="module")
def embedded(folder):
    model = load_lvlm(settings("embedded", folder))
    yield model
    model.close()  # pyright: ignore


async def ask(model, asked, **bound):
    model = model.bind(**bound)
    return await asyncio.gather(*(model.ainvoke(messages) for messages in asked))


async def test_server_and_embedded_engine_agree(chat, embedded):
    asked = questions(24)
    theirs = await ask(chat, asked, response_format=CRITIC)
    ours = await ask(embedded, asked, response_format=CRITIC)
    same = 0
    for their, our in zip(theirs, ours, strict=True):
        if their.response_metadata["finish_reason"] == "stop":
            CriticAnswer.model_validate(json.loads(their.content))
        same += their.content == our.content or our.content.startswith(their.content[:LIMIT])
    assert same >= 23
    assert theirs[0].usage_metadata["input_tokens"] == ours[0].usage_metadata["input_tokens"]
    rewriter = load_prompt("rewriter-compact").messages(prompt="a dog", target="arousal +1.0", rounds=[])
    schema = response_format("rewrite", REWRITER_SCHEMA)
    [their], [our] = [
        await ask(m, [rewriter], response_format=schema, max_tokens=64) for m in (chat, embedded)
    ]
    assert our.content.startswith(their.content[:60])


async def test_scores_agree(chat, embedded):
    asked = questions(8, "score-compact")
    theirs = [read_scores(m) for m in await ask(score_only(chat), asked)]
    ours = [read_scores(m) for m in await ask(score_only(embedded), asked)]
    for their, our in zip(theirs, ours, strict=True):
        for axis in ("valence", "arousal"):
            assert their[axis].expected == pytest.approx(our[axis].expected, abs=1e-3)
            assert -3.95 <= their[axis].expected <= 3.95
    scored = await Scorer(chat, "score-compact").score(picture(0), "a dog 0", EmotionTarget(valence=1))
    assert isinstance(scored, dict)


async def test_the_prefix_cache_serves_a_rubric(chat, server):
    template = load_prompt("critic")
    before = metrics(server.url)
    for i in range(4):
        await chat.ainvoke(
            template.messages((image_url(picture(i)),), prompt="a dog", target="valence +1.0"), max_tokens=2
        )
    hits, asked = prefix_hits(metrics(server.url), before)
    assert hits / asked > 0.6  # three of four find the rubric


async def test_a_server_of_ones_own_agrees(python, folder, embedded):
    model = await asyncio.to_thread(load_lvlm, settings("vllm-offline", folder, python=python))
    try:
        asked = questions(12)
        theirs = await ask(model, asked, response_format=CRITIC)
        ours = await ask(embedded, asked, response_format=CRITIC)
        assert (
            sum(our.content.startswith(t.content[:LIMIT]) for t, our in zip(theirs, ours, strict=True)) >= 11
        )
        [scored] = await ask(score_only(model), questions(1, "score-compact"))
        [same] = await ask(score_only(embedded), questions(1, "score-compact"))
        assert read_scores(scored)["valence"].expected == pytest.approx(
            read_scores(same)["valence"].expected, abs=1e-3
        )
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
        with pytest.raises(LVLMUnavailable, match="answered 400"):
            await ask(model, asked[:1], response_format=bad)
        spoken = [HumanMessage("a dog beside an <image> <|assistant|> by the sea")]
        [their] = await ask(model, [spoken], max_tokens=8)
        [our] = await ask(embedded, [spoken], max_tokens=8)
        assert their.content == our.content
    finally:
        pid = model._own._child.process.pid  # pyright: ignore
        model.close()
    assert not psutil.pid_exists(pid)


def test_a_server_of_ones_own_says_why_it_cannot_start(python, tmp_path):
    folder = tiny_lvlm.build(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="vLLM ended"):
        load_lvlm(settings("vllm-offline", folder, python=python))


def wait_for_answers(server):
    while not metrics(server.url).get("vllm:request_success_total"):
        time.sleep(0.2)


def critiques(result):
    return [c.critique for r in result.rounds for c in r.candidates]


async def test_runs_survive_a_restart(python, folder, tmp_path):
    """16 runs, the server killed in their middle and started again 20 s later: every run completes."""
    first = VLLMServer(str(folder), python=python, log=tmp_path / "1.log").start()
    lvlm = settings("vllm", folder, first)
    lvlm = lvlm.model_copy(update={"critic_prompt": "critic-compact", "rewriter_prompt": "rewriter-compact"})
    overrides = {"home": tmp_path / "home", "loop": {"rounds": 2, "images": 2, "patience": 5}}
    try:
        async with open_loop(generator=tiny.build("sd3"), lvlm=lvlm, **overrides) as loop:
            target = EmotionTarget(valence=2.9, arousal=-2.9)
            runs = [asyncio.create_task(loop.run(f"a dog on {i}", target, seed=i)) for i in range(16)]
            await asyncio.to_thread(wait_for_answers, first)
            for process in psutil.Process(first._child.process.pid).children(recursive=True):  # pyright: ignore
                process.kill()
            await asyncio.sleep(20)
            second = VLLMServer(str(folder), python=python, port=first.port, log=tmp_path / "2.log")
            try:
                await asyncio.to_thread(second.start)
                results = await asyncio.gather(*runs)
            finally:
                await asyncio.to_thread(second.stop)
    finally:
        first.stop()
    assert {result.status for result in results} == {"completed"}
    assert all(
        critique.__class__.__name__ == "Critique" for result in results for critique in critiques(result)
    )


def test_serve_ends_cleanly_on_sigterm(python, folder, tmp_path):
    env = {**os.environ, "EMOLOOP_LVLM__VLLM_PYTHON": str(python), "EMOLOOP_HOME": str(tmp_path)}
    line = [sys.executable, "-m", "emoloop.cli", "lvlm", "serve", str(folder), "--port", "0"]
    child = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    url = child.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
    assert httpx.get(url + "/models", trust_env=False).json()["data"][0]["id"] == str(folder)
    tree = psutil.Process(child.pid).children(recursive=True)
    assert len(tree) >= 3
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert "stopping vLLM" in errors
    assert "Traceback" not in errors
    assert not [process for process in tree if process.is_running() and process.status() != "zombie"]
