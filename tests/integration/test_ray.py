"""Actors on a local Ray cluster of two nodes: their log says what one process says, a killed one costs open rounds."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import yaml
from emoloop.domain import UserError
from emoloop.evals.bench import ray_workers as bench
from emoloop.evals.bench.workers import essence, open_fakes
from emoloop.evals.document import Options
from emoloop.evals.evaluate import evaluate
from emoloop.graph.collect import collect
from emoloop.graph.ray_workers import collect_on_ray
from emoloop.settings import load_settings
from emoloop.traces.store import open_store

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

LINES = [{"prompt": "a dog", "valence": v / 4, "seed": v + 9} for v in range(-4, 5)] + [{"prompt": "a cat"}]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        patched.setenv("RAY_ADDRESS", cluster.address)
        yield
        ray.shutdown()
        cluster.shutdown()


def test_several_actors_say_what_one_process_says_and_a_killed_one_costs_its_open_rounds():
    figures = bench.main(runs=12, concurrency=4, rounds=2, images=2, batch_seconds=0.2, answer_seconds=0.1)[
        "figures"
    ]
    assert figures["equal"] == 1
    assert figures["repeated_one"] == figures["repeated_several"] == 0
    assert figures["repeated_killed"] <= 4 * 2


async def test_a_collection_is_the_same_on_actors(tmp_path, postgres):
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(map(json.dumps, LINES)))
    loop = {"rounds": 2, "images": 2, "patience": 2, "tolerance": 0.0}
    about = {"loop": loop, "batch_seconds": 0.05, "answer_seconds": 0.02, "url": None}
    here, there = {**about, "home": str(tmp_path / "here")}, {**about, "home": str(tmp_path / "there")}
    there["url"] = postgres
    seen, told = [], []
    async with open_fakes(here) as alone:
        await collect(alone, source, tmp_path / "here.failed", on_outcome=seen.append)
        expected = essence(alone.recorder.store)
    settings = load_settings({"home": there["home"], "loop": loop, "traces": {"database_url": postgres}})
    make, failed = partial(open_fakes, there), tmp_path / "there.failed"
    await collect_on_ray(settings, source, failed, concurrency=2, on_outcome=told.append, make=make)
    with open_store(settings) as store:
        ours = {name: it for name, it in essence(store).items() if name.startswith("c-")}
        assert ours == expected and store.queue.counts()["run"]["done"] >= 9
        assert not store.queue.held()
    by_line = sorted(seen, key=lambda it: it.line)
    assert sorted(told, key=lambda it: it.line) == by_line and by_line[-1].error
    assert failed.read_text() == (tmp_path / "here.failed").read_text()
    again = []
    await collect_on_ray(settings, source, failed, on_outcome=again.append, make=make)
    assert sorted((it.line, it.known) for it in again) == [(n, n < 10) for n in range(1, 11)]


async def test_actors_on_several_machines_want_a_log_that_all_reach(tmp_path):
    with pytest.raises(UserError, match=r"several machines.*traces\.database_url"):
        await collect_on_ray(load_settings({"home": tmp_path}), tmp_path / "none", tmp_path / "failed")


async def test_models_that_cannot_be_opened_are_told_in_one_line(tmp_path, postgres):
    given = {"home": tmp_path, "traces": {"database_url": postgres}, "loop": {"reward": "no_such_reward"}}
    with pytest.raises(UserError, match="no_such_reward") as raised:
        await collect_on_ray(load_settings(given), tmp_path / "none", tmp_path / "failed")
    assert "\n" not in str(raised.value)


def test_an_evaluation_is_the_same_on_actors(tmp_path):
    folder = tiny.save("sd3", tmp_path / "sd3", tokenizer=tiny.word_tokenizer())
    suite = tmp_path / "tiny.yaml"
    asked = {"prompts": ["a dog by the sea", "a cat on a hill"], "targets": [{"valence": 2, "arousal": -1}]}
    about = {"name": "tiny", "version": 1, "about": "two prompts", "seed": 3, "images": 2, "rounds": 1}
    suite.write_text(
        yaml.safe_dump({**about, "arms": ["base"], "judge": "eval_parts:Light", "blocks": [asked]})
    )
    settings = {"generator": {"model": str(folder), "steps": 2, "micro_batch": 2}, "home": tmp_path / "here"}
    options = Options(str(suite), settings=settings)
    document, _ = evaluate(options, tmp_path / "out")
    there = replace(options, settings={**settings, "home": tmp_path / "there"})
    on_ray, outcome = evaluate(there, tmp_path / "there-out", engine="ray")
    timed = {name for name in document["figures"] if "second" in name}
    assert {k: v for k, v in on_ray["figures"].items() if k not in timed} == {
        k: v for k, v in document["figures"].items() if k not in timed
    }
    assert outcome.made == 0 and (tmp_path / "there-out" / "report.html").is_file()
    assert os.listdir(tmp_path / "there" / "evals")
