"""Whole runs over HTTP whose server dies: with a restart nothing is lost, without one every run ends soon."""

import asyncio
import json
import time

import pytest
import tiny
from emoloop import EmotionTarget, open_loop
from emoloop.domain import Missing
from emoloop.settings import LVLMSettings
from emoloop.tools.lvlm import vllm as vllm_client
from fake_openai import chat, serving
from scripted import critic_answer

RUNS = 16


def answer(number, body):
    """A critique or a rewrite, as the schema asks; slowly, so that runs are under way when the server dies."""
    time.sleep(0.02)
    name = body.get("response_format", {}).get("json_schema", {}).get("name")
    rewrite = {"why": "w", "changes": "c", "prompt": "a dog by the sea bright"}
    return chat(json.dumps(rewrite) if name == "rewrite" else critic_answer(valence=-1.0))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST", 0.02)
    monkeypatch.setattr(vllm_client, "CAP", 0.2)


async def runs_whose_server_dies(server, tmp_path, patience, then):
    lvlm = LVLMSettings(
        engine="vllm",
        model="tiny",
        base_url=server.url,
        timeout=20,
        patience=patience,
        critic_prompt="critic-compact",
        rewriter_prompt="rewriter-compact",
    )
    loop_settings = {"rounds": 2, "images": 2, "patience": 5}
    async with open_loop(
        generator=tiny.build("sd3"), lvlm=lvlm, home=tmp_path / "home", loop=loop_settings
    ) as loop:
        target = EmotionTarget(valence=2.9, arousal=-2.9)
        runs = [asyncio.create_task(loop.run("a dog by the sea", target, seed=i)) for i in range(RUNS)]
        enough = asyncio.Event()
        tell = asyncio.get_running_loop().call_soon_threadsafe

        def script(number, body):
            if number >= 10:
                tell(enough.set)
            return answer(number, body)

        server.script = script
        await enough.wait()
        await asyncio.to_thread(server.kill)
        return await then(runs)


async def test_a_restart_loses_nothing(tmp_path):
    with serving() as server:

        async def then(runs):
            await asyncio.sleep(1)
            with serving(server.server_port) as again:
                again.script = answer
                return await asyncio.gather(*runs)

        results = await runs_whose_server_dies(server, tmp_path, 120, then)
    assert {result.status for result in results} == {"completed"}
    critiques = [c.critique for result in results for r in result.rounds for c in r.candidates]
    assert len(critiques) == RUNS * 2 * 2
    assert not any(isinstance(critique, Missing) for critique in critiques)


async def test_without_a_restart_all_end_soon_and_say_why(tmp_path):
    with serving() as server:

        async def then(runs):
            began = time.monotonic()
            results = await asyncio.gather(*runs)
            assert time.monotonic() - began < 60  # far from 16 runs times the patience
            return results

        results = await runs_whose_server_dies(server, tmp_path, 1.0, then)
    for result in results:
        candidates = [c for r in result.rounds for c in r.candidates]
        missing = [c.critique for c in candidates if isinstance(c.critique, Missing)]
        if result.status == "failed":
            assert result.stop_reason == "no_critique"
        assert missing or result.warnings
        assert all("no LVLM server at" in critique.reason for critique in missing)
        assert all(c.reward is None for c in candidates if isinstance(c.critique, Missing))
