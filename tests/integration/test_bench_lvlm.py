"""The bench of the critic's engine against a scripted server: its figures say what the server did."""

import json
import math

import pytest
from emoloop.evals.bench import lvlm, run
from fake_openai import chat, serving
from scripted import critic_answer

SCORES = '+1.0", "arousal": "-0.5'


def with_logprobs(text):
    """An answer whose characters are tokens that are as good as certain."""
    status, headers, body = chat(text)
    answer = json.loads(body)
    likely, other = math.log(0.99), {"token": "~", "logprob": math.log(0.01)}
    answer["choices"][0]["logprobs"] = {
        "content": [
            {"token": c, "logprob": likely, "top_logprobs": [{"token": c, "logprob": likely}, other]}
            for c in text
        ]
    }
    return status, headers, json.dumps(answer).encode()


def answer(number, body):
    """The tokens of a conversation, scores, a critique (some of them broken), or two tokens."""
    asked = json.dumps(body["messages"])
    if set(body) == {"messages"}:
        return 200, {}, json.dumps({"tokens": list(asked.encode())}).encode()
    if body["messages"][-1]["role"] == "assistant":
        return with_logprobs(SCORES)
    if "response_format" in body:
        text = "no JSON" if "clear" in asked else critic_answer(valence=1.0)
        return with_logprobs(text) if body.get("logprobs") else chat(text)
    return chat("ok")


@pytest.mark.parametrize("embedded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_figures_are_those_of_the_server(monkeypatch, embedded):
    monkeypatch.setattr(lvlm, "TURNS", 1)
    options = {"n": 6, "concurrency": 3, "runs": 3, "candidates": 2, "embedded": embedded, "seed": 3}
    with serving(models=("miniature",)) as server:
        server.script = answer
        monkeypatch.setenv("EMOLOOP_LVLM__BASE_URL", server.url)
        document = run("lvlm", lvlm.main, options)
        asked = [json.dumps(body["messages"]) for body in server.requests if "response_format" in body]
    figures = document["figures"]
    assert figures["valid_json"] == pytest.approx(1 - sum("clear" in text for text in asked[:6]) / 6)
    assert figures["prefix_hit_rate"] > 0
    assert figures["concurrency_gain"] == pytest.approx(
        figures["critiques_per_second"] / figures["critiques_per_second_alone"]
    )
    assert 0 < figures["score_valence_error"] < 6
    assert ("agreement" in figures) == embedded
    assert all(it["margin"] == pytest.approx(math.log(99)) for it in document["differences"])
    assert bool(document["differences"]) == embedded
    assert server.most_at_once <= 3
    assert document["seeds"] == [3] and document["settings"]["runs"] == 3
    assert "api_key" not in document["lvlm"]
