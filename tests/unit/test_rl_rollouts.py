"""Rollouts: what the log gives, and that training reads whatever source gives the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from emoloop.cli.options import read_where
from emoloop.domain import Emotion, EmotionTarget, UserError
from emoloop.events import HumanFeedback
from emoloop.rl.config import DataConfig
from emoloop.rl.data.dataset import Dataset
from emoloop.rl.rollouts import Base, LogRollouts, Request, Rollout, origin
from emoloop.tools.reward import Reward, load_reward
from emoloop.traces.rows import RunFilter
from emoloop.traces.store import open_store
from rl_log import run_events, settings_for, write_log
from sqlalchemy import create_engine, text

ALL = DataConfig(held_out=0)


def test_a_rollout_says_what_made_the_image_and_what_was_read(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 2, adapter="abc", category=Emotion.AWE)) as store:
        source = LogRollouts(store)
        requests = dict(source)
        rows = {(row.run_id, row.round, row.index): row for row in store.candidates()}
        assert [request.run_id for request in requests] == ["run-0000", "run-0001"]
        assert sum(map(len, requests.values())) == len(rows) == 12
        for request, rollouts in requests.items():
            assert source.fetch([request.run_id]) == {request.run_id: rollouts}
            for it in rollouts:
                row = rows[request.run_id, it.round, it.index]
                assert (it.sha256, it.prompt, it.seed, it.reward) == (
                    row.sha256,
                    row.prompt,
                    row.seed,
                    row.reward,
                )
                assert it.version == "abc" and it.critique is not None
                assert (it.critique.valence, it.critique.category) == (row.valence, Emotion.AWE)
        assert source.base == Base("tiny", "r1", "abc") and source.critics() == ["l"]


class Sampler:
    """Rollouts that no log has seen, as an online trainer would sample them."""

    base, reward = Base("tiny", None, None), ("emotion", "1")

    def __iter__(self) -> Iterator[tuple[Request, list[Rollout]]]:
        for number in range(3):
            request = Request(f"group-{number}", f"a dog {number}", EmotionTarget(valence=1.0))
            yield request, [
                Rollout(request, 0, index, request.prompt, index, f"{number}{index}", 0.5, 0.0, 1.0,
                        None, None, index / 10, version=f"step-{number}")
                for index in range(4)
            ]  # fmt: skip

    def fetch(self, run_ids: Sequence[str]) -> dict[str, list[Rollout]]:
        return {request.run_id: some for request, some in self if request.run_id in run_ids}

    def rescore(self, run_id: str) -> Reward:
        return load_reward("emotion")

    def critics(self) -> list[str]:
        return []


def test_training_reads_any_source(tmp_path: Path) -> None:
    dataset = Dataset(Sampler(), ALL)
    groups = dataset.examples("groups").fetch(range(3))
    assert [(it.run_id, it.rewards) for it in groups] == [
        (f"group-{number}", (0.0, 0.1, 0.2, 0.3)) for number in range(3)
    ]
    assert [it.winner for it in dataset.examples("bests").fetch([0, 2])] == ["03", "23"]
    assert dataset.statistics.images == 12 and dataset.statistics.dropped == {"no rewrite": 3}


def test_the_hash_of_the_data_is_that_of_earlier_versions(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 3)) as store:
        found = Dataset(LogRollouts(store), ALL).statistics.data_hash
    # By the version that had no rollouts: its unfinished trainings go on.
    assert found == "556de3131242da884db9f65a2dcdc7a8e28aa6a1b5f0129ef56081b896795af4"


def test_of_several_bases_each_is_named_by_its_flag(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path)) as store:
        store.append(*run_events(store, 0), *run_events(store, 1, adapter="abcdef0123456789"))
        store.append(*run_events(store, 2, model="a model, other"))
        with pytest.raises(UserError, match="3 base models") as failed:
            LogRollouts(store)
        _, flags = str(failed.value).split("pick one with ")
        picked = set()
        for flag in flags.split(" or "):
            name, condition = shlex.split(flag)
            assert name == "--from"
            picked.add(origin(store, read_where([condition]))[0])
        assert {(base.model, base.adapter) for base in picked} == {
            ("tiny", None), ("tiny", "abcdef0123456789"), ("a model, other", None),
        }  # fmt: skip
    with open_store(settings_for(tmp_path / "two")) as store:
        store.append(*run_events(store, 0), *run_events(store, 1, adapter="abcdef0123456789"))
        cure = re.escape("--from adapter=abcdef012345 or --from adapter=none")
        with pytest.raises(UserError, match=cure):
            LogRollouts(store)


class Undefined:
    """A reward that is no number."""

    name, version = "emotion", "1"

    def __call__(self, critique: object, target: object) -> float:
        return float("nan")


def test_a_reward_that_is_no_number_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_log(tmp_path, 2)
    engine = create_engine(f"sqlite:///{tmp_path / 'events.db'}")
    with engine.begin() as connection:
        connection.execute(
            text("update candidates set reward = 9e999 where run_id = 'run-0000' and \"index\" = 0")
        )
    engine.dispose()
    with open_store(settings) as store:
        statistics = Dataset(LogRollouts(store), ALL).statistics
        assert (statistics.rewarded, statistics.missing) == (10, 2)
        monkeypatch.setattr("emoloop.rl.rollouts.load_reward", lambda spec: load_reward(Undefined()))
        sha = next(store.candidates("run-0001")).sha256
        store.append(HumanFeedback(run_id="run-0001", sha256=sha, valence=1.0))
        statistics = Dataset(LogRollouts(store), ALL).statistics
        assert (statistics.rewarded, statistics.missing) == (9, 3)


def test_no_example_says_what_was_dropped_or_held_out(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 3)) as store:
        with pytest.raises(
            UserError, match=r"3 runs give no pairs to train on, and 3 held out .lower data.held_out"
        ):
            Dataset(LogRollouts(store), DataConfig(held_out=0.99999)).examples("pairs")
        with pytest.raises(UserError, match="answers to --from"):
            LogRollouts(store, RunFilter(run_ids=()))


def test_the_policies_of_an_online_training_are_named_in_short(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path)) as store:
        for run in range(7):
            store.append(*run_events(store, run, adapter=f"{run}" * 64))
        with pytest.raises(UserError, match=r"7 base models \(.*; …\): pick one with .* or …$") as failed:
            LogRollouts(store)
    assert len(str(failed.value)) < 400
