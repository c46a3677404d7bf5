"""A real Phoenix: a browser sees prompt, answer and picture of each critique, and a replay is what was sent live."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from emoloop import EmotionTarget, open_loop
from emoloop.domain import Critique
from emoloop.events import Critiqued
from hosts.conftest import running
from hosts.environments import program

PROMPT = "a dog by the sea"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phoenix")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        grpc = str(taken.getsockname()[1])
    with running(
        "phoenix",
        "phoenix",
        "serve",
        folder=folder,
        healthy="/healthz",
        PHOENIX_PORT="PORT",
        PHOENIX_GRPC_PORT=grpc,
        PHOENIX_HOST="127.0.0.1",
        PHOENIX_WORKING_DIR=str(folder),
        PHOENIX_TELEMETRY_ENABLED="false",
        PHOENIX_ALLOW_EXTERNAL_RESOURCES="false",
    ) as url:
        yield url


@pytest.fixture(scope="module")
def run(phoenix, tmp_path_factory):
    """A run of the embedded models that was traced live: its events, and its spans as Phoenix has them."""
    home = tmp_path_factory.mktemp("home")
    loop = {"rounds": 2, "images": 1, "exhaust": True}
    traces = {"otlp_endpoint": phoenix, "capture_content": True}
    with open_loop(home=home, traces=traces, loop=loop) as it:
        result = it.run_sync(PROMPT, EmotionTarget(valence=2), seed=1)
        events = asyncio.run(it.recorder.events(result.run_id))
    return home, result.run_id, events, spans(phoenix, len([e for e in events if hasattr(e, "model")]))


def spans(url: str, calls: int) -> dict:
    """The spans by their ids, once all have arrived: Phoenix writes them after it has answered."""
    for _ in range(600):
        found = httpx.get(f"{url}/v1/projects/default/spans?limit=500", trust_env=False)
        data = found.json()["data"] if found.is_success else []
        # Six are of the run and of its agents' turns.
        if len(data) == calls + 6:
            return {it["context"]["span_id"]: {k: v for k, v in it.items() if k != "id"} for it in data}
        asyncio.run(asyncio.sleep(0.1))
    raise AssertionError(data)


def look(*pages):
    """What Chromium shows of each (address, texts to wait for)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    look = [str(program("phoenix", "python")), str(Path(__file__).with_name("look.py")), CHROMIUM]
    done = subprocess.run(look, input=json.dumps(pages), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_browser_sees_prompt_answer_and_picture_of_each_critique(phoenix, run):
    *_, events, live = run
    critiques = [event for event in events if isinstance(event, Critiqued)]
    pages = []
    for event in critiques:
        assert isinstance(event.critique, Critique)
        [span] = [
            it["context"]["span_id"]
            for it in live.values()
            if it["name"].startswith("chat") and it["attributes"].get("emoloop.image.sha256") == event.sha256
        ]
        texts = [f"prompt: {PROMPT}", event.critique.analysis, event.critique.suggestion]
        pages.append((f"{phoenix}/redirects/spans/{span}", texts))
    for event, page in zip(critiques, look(*pages), strict=True):
        assert page["errors"] == []
        shown = {
            hashlib.sha256(base64.b64decode(source.partition(",")[2])).hexdigest(): width
            for source, width in page["pictures"]
            if source.startswith("data:image/png")
        }
        assert shown == {event.sha256: 96}


def test_the_table_says_what_each_span_is_asked_and_answers(phoenix, run):
    *_, live = run
    kinds = {it["name"].split()[0]: it["span_kind"] for it in live.values()}
    assert kinds == {
        "invoke_workflow": "CHAIN",
        "invoke_agent": "AGENT",
        "chat": "LLM",
        "generate_content": "LLM",
    }
    for it in live.values():
        asked = it["attributes"].get("input.value")
        assert (asked is None) == it["name"].startswith("invoke_agent")
        answered = it["attributes"].get("output.value")
        assert (answered is None) == it["name"].startswith(("invoke_agent", "generate_content"))
        assert ("llm.token_count.total" in it["attributes"]) == it["name"].startswith("chat")


def test_a_replay_is_what_was_sent_live(phoenix, run):
    home, run_id, _, live = run
    [trace] = {it["context"]["trace_id"] for it in live.values()}
    httpx.delete(f"{phoenix}/v1/traces/{trace}", trust_env=False).raise_for_status()
    replay = ["traces", "replay", run_id, "--home", str(home), "--endpoint", phoenix, "--content"]
    subprocess.run([sys.executable, "-m", "emoloop", *replay], check=True)
    assert spans(phoenix, len(live) - 6) == live
