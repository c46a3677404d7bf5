"""A short soak: many critiques in one `collect` leave no connection and no memory behind."""

import json
import time

import tiny
from fake_openai import chat, serving
from faults import soak
from scripted import critic_answer


def answer(number, body):
    """A critique or a rewrite, as the schema asks; slowly, so that requests overlap."""
    time.sleep(0.02)
    name = body.get("response_format", {}).get("json_schema", {}).get("name")
    rewrite = {"why": "w", "changes": "c", "prompt": "a dog by the sea bright"}
    return chat(json.dumps(rewrite) if name == "rewrite" else critic_answer(valence=-1.0))


def test_nothing_grows(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOLOOP_GENERATOR__MODEL", str(tiny.save("sd3", tmp_path / "sd3")))
    monkeypatch.setenv("EMOLOOP_LVLM__MODEL", "tiny")
    with serving() as server:
        server.script = answer
        monkeypatch.setenv("EMOLOOP_LVLM__BASE_URL", server.url)
        figures = soak.main(n=40, warm_up=16, concurrency=4, rounds=2, images=4)["figures"]
    assert figures["critiques"] >= 40
    assert figures["answered"] == 1.0
    assert figures["connections_growth"] == 0
    assert figures["connections_after_close"] < figures["connections"]
    assert figures["memory_growth_mb"] < 50
    assert server.most_at_once <= 4
