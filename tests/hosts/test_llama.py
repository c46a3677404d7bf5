"""A real pretrained chat model, SmolLM2-135M-Instruct on llama.cpp's server: the plumbing of `emoloop rewrite`.

Nothing here says how well so small a model writes. Drafts that can be used may come or not; both ways are told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emoloop.agents.rewriters.mc_agent.answer import STEPS
from emoloop.agents.rewriters.mc_agent.drawable import lost, undrawable
from hosts.conftest import running

NEUTRAL = "a dog by the sea"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    words = (str(Path(__file__).with_name("llama.py")), "PORT")
    with running(
        "llama", "python", *words, folder=tmp_path_factory.mktemp("llama"), healthy="/health"
    ) as url:
        yield url


def rewrite(url: str, home: Path, prompt: str, *words: str) -> dict[str, Any]:
    """What the command prints as JSON; it must end well."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("EMOLOOP_")}
    # One request at a time, as the server takes them: what waits here is not late.
    sets = ("lvlm.model=smollm2", "lvlm.concurrency=1", "lvlm.timeout=600", "loop.personas=3")
    line = [
        sys.executable,
        "-m",
        "emoloop.cli",
        "rewrite",
        prompt,
        "--valence",
        "-2",
        "--arousal",
        "1",
        "--json",
    ]
    line += ["--lvlm", f"{url}/v1", *(it for one in sets for it in ("--set", one)), *words]
    done = subprocess.run(line, env=own | {"EMOLOOP_HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_personas_answer_in_form_and_what_comes_out_is_checked(llama, tmp_path):
    found = rewrite(llama, tmp_path, NEUTRAL, "--rewriter", "mc_agent", "--count", "3")
    assert len(found["drafts"]) >= 3 and len({it["persona"] for it in found["drafts"]}) == 3
    for draft in found["drafts"]:
        # The grammar holds: an answer without the form, or one that is cut, would leave no step.
        assert draft["said"] and list(draft["said"]) == [step for step in STEPS if step in draft["said"]]
        assert all(len(words) <= STEPS[step] for step, words in draft["said"].items())
        usable = not lost(NEUTRAL, draft["prompt"]) and not undrawable(draft["prompt"]) and draft["prompt"]
        assert usable or draft["reason"]
    assert len({it["prompt"] for it in found["proposals"]}) == len(found["proposals"]) in (1, 2, 3)
    for one in found["proposals"]:
        assert not lost(NEUTRAL, one["prompt"]) and not undrawable(one["prompt"])
    if len(found["proposals"]) < 3:
        assert (
            any("where 3 were wanted" in it for it in found["warnings"])
            or found["proposals"][0]["prompt"] == NEUTRAL
        )
    if all(it.get("reason") for it in found["drafts"]):
        assert any("no persona's draft can be used" in it for it in found["warnings"])


def test_where_no_draft_keeps_what_was_asked_for_the_simple_rewriter_is_asked_and_checked(llama, tmp_path):
    odd = "a zeppelin, an astrolabe and a xylophone beside a samovar"
    found = rewrite(llama, tmp_path, odd, "--rewriter", "mc_agent", "--set", "loop.personas=1")
    assert found["drafts"] and all(it["reason"] for it in found["drafts"])
    assert any("the simple rewriter wrote" in it for it in found["warnings"])
    assert not lost(odd, found["proposals"][0]["prompt"])


def test_the_simple_rewriter_writes(llama, tmp_path):
    found = rewrite(llama, tmp_path, NEUTRAL, "--rewriter", "simple")
    [one] = found["proposals"]
    assert found["model"] == "smollm2" and not found["drafts"] and not found["warnings"]
    assert one["prompt"] and len(one["changes"]) <= 200 and len(one["why"]) <= 300
