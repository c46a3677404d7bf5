"""The dataset: what the log becomes, what is left out and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emoloop.domain import Critique, Emotion, EmotionTarget, UserError
from emoloop.events import Critiqued, HumanFeedback
from emoloop.rl.config import DataConfig
from emoloop.rl.data.dataset import Dataset
from emoloop.rl.data.examples import source_for
from emoloop.rl.data.split import held_out
from emoloop.rl.rollouts import LogRollouts
from emoloop.tools.reward import load_reward
from emoloop.traces.rows import RunFilter
from emoloop.traces.store import open_store
from rl_log import default_reward, run_events, settings_for, write_log

ALL = DataConfig(held_out=0)


def test_the_gain_leaves_out_the_image_that_won(tmp_path: Path) -> None:
    rewards = {(0, 0): 0.0, (0, 1): 0.2, (0, 2): 0.1, (1, 0): 0.4, (1, 1): 1.0, (1, 2): 0.6}
    settings = write_log(tmp_path, 1, reward=lambda run, round_, index: rewards[round_, index])
    with open_store(settings) as store:
        (pair,) = Dataset(LogRollouts(store), ALL).examples("pairs").fetch([0])
        assert pair.advantage == pytest.approx(0.5 - 0.1)
        (biased,) = (
            Dataset(LogRollouts(store), DataConfig(held_out=0, gate="all")).examples("pairs").fetch([0])
        )
        assert biased.advantage == pytest.approx(2.0 / 3 - 0.1)
    assert pair.prompt == "a dog" and pair.refined == "a dog bright 1"


def test_which_rewritten_prompts_teach(tmp_path: Path) -> None:
    def reward(run: int, round_: int, index: int) -> float:
        # Round 0 has one lucky image, round 1 is good, round 2 a little better than neutral.
        return {0: (2.0, -1.0, -1.0), 1: (0.9, 0.8, 0.7), 2: (0.2, 0.1, 0.3)}[round_][index]

    with open_store(write_log(tmp_path, 1, rounds=3, reward=reward)) as store:

        def gains(**how: object) -> list[float]:
            examples = Dataset(LogRollouts(store), DataConfig(held_out=0, **how)).examples("pairs")  # type: ignore[arg-type]
            return [pair.advantage or 0 for pair in examples.fetch(range(len(examples)))]

        assert gains() == pytest.approx([0.8, 0.2])
        assert gains(refined="best") == pytest.approx([0.8])
        assert gains(min_gain=0.5) == pytest.approx([0.8])
        with pytest.raises(UserError, match="round 0 won"):
            gains(refined="winner")


def test_in_hindsight_a_prompt_teaches_what_it_hit(tmp_path: Path) -> None:
    def reading(round_: int, index: int) -> tuple[float, float]:
        return (0.0, 0.0) if round_ == 0 else (1.0 + 0.3 * index, -0.6)

    asked = EmotionTarget(valence=-2.0, arousal=2.0)
    with open_store(write_log(tmp_path, 1, reading=reading, target=asked)) as store:
        every = DataConfig(held_out=0, told="read", gate="all")
        (pair,) = Dataset(LogRollouts(store), every).examples("pairs").fetch([0])
        assert pair.wanted == asked
        assert pair.target.point == pytest.approx((1.3, -0.6))
        reward = load_reward("emotion")

        def mean(round_: int) -> float:
            seen = [reading(round_, index) for index in range(3)]
            reads = [Critique(valence=v, arousal=a, category=None, alignment=1.0) for v, a in seen]
            return float(np.mean([reward(read, pair.target) for read in reads]))

        assert pair.advantage == pytest.approx(mean(1) - mean(0))
        assert pair.advantage > 0.2
        # An axis that nobody asked for is not told either.
    with open_store(
        write_log(tmp_path / "one", 1, reading=reading, target=EmotionTarget(valence=-2.0))
    ) as store:
        (pair,) = Dataset(LogRollouts(store), every).examples("pairs").fetch([0])
        assert pair.target.point == pytest.approx((1.3, None))


def test_each_source_holds_what_it_says(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 6)) as store:
        dataset = Dataset(LogRollouts(store), ALL)
        row = {(r.run_id, r.round, r.index): r for r in store.candidates()}
        by_sha = {r.sha256: r for r in row.values()}
        (best,) = dataset.examples("bests").fetch([2])
        assert by_sha[best.winner].reward == max(r.reward for r in row.values() if r.run_id == "run-0002")
        preferences = dataset.examples("preferences")
        for pair in preferences.fetch(range(len(preferences))):
            winner, loser = by_sha[pair.winner], by_sha[pair.loser]
            if pair.kind == "rounds":
                assert winner.round == 1 and loser.round == 0 and winner.reward > loser.reward
            elif pair.kind == "within":
                assert winner.round == loser.round == 0 and winner.reward > loser.reward
            else:
                assert pair.kind == "across" and winner.run_id != loser.run_id
        for group in dataset.examples("groups").fetch(range(6)):
            assert len(group.rewards) == 3 and group.reward in group.rewards
            assert by_sha[group.image].round == 0
        (whole,) = (
            Dataset(LogRollouts(store), DataConfig(held_out=0, group="all")).examples("groups").fetch([0])
        )
        assert len(whole.rewards) == 6


def test_runs_of_one_prompt_with_other_targets_are_compared(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with open_store(settings) as store:
        for run, valence in enumerate((2.0, -2.0, 1.8)):
            target = EmotionTarget(valence=valence)
            store.append(*run_events(store, run, prompt="a dog", target=target))
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0, kinds=("across",)))
        pairs = dataset.examples("preferences").fetch(range(2))
        assert {(p.target.valence, p.kind) for p in pairs} == {(2.0, "across"), (-2.0, "across")}
        assert dataset.statistics.kinds == {"rounds": 0, "within": 0, "across": 2, "human": 0}


def test_missing_rewards_are_left_out_not_counted_as_zero(tmp_path: Path) -> None:
    def reward(run: int, round_: int, index: int) -> float | None:
        return None if index == 1 else 1.0 + round_ + index / 10

    with open_store(write_log(tmp_path, 1, reward=reward)) as store:
        dataset = Dataset(LogRollouts(store), ALL)
        (pair,) = dataset.examples("pairs").fetch([0])
        assert pair.advantage == pytest.approx(2.0 - 1.1)
        assert dataset.statistics.missing == 2 and dataset.statistics.rewarded == 4


def test_why_runs_give_no_pair(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with open_store(settings) as store:
        store.append(*run_events(store, 0, reward=lambda *place: 1.0 - place[1]))
        store.append(*run_events(store, 1, images=1))
        store.append(*run_events(store, 2, reward=lambda run, round_, index: 0.5 + (round_ and index) * 0.01))
        store.append(*run_events(store, 3))
        store.append(*run_events(store, 4, rounds=1))
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0, min_gain=0.05, refined="winner"))
        assert dataset.statistics.dropped == {
            "gain too small": 1,
            "one image a prompt: none is left to measure the gain with": 1,
            "round 0 won": 2,
        }
        assert len(dataset.examples("pairs")) == 1
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0, min_gain=0.05))
        assert dataset.statistics.dropped == {
            "gain too small": 2,
            "no rewrite": 1,
            "one image a prompt: none is left to measure the gain with": 1,
        }
        with pytest.raises(UserError, match=r"5 runs give no pairs to train on .*too small.*loosen"):
            Dataset(LogRollouts(store), DataConfig(held_out=0, min_gain=5)).examples("pairs")


def test_candidates_on_which_critics_differ_are_left_out(tmp_path: Path) -> None:
    settings = write_log(tmp_path, 2, spread=0.1)
    with open_store(settings) as store:
        place = {"run_id": "run-0000", "round": 0, "index": 0, "node": "second-critic"}
        sha = next(r.sha256 for r in store.candidates("run-0000"))
        second = Critique(valence=2.0, arousal=0.0, alignment=1.0)
        store.append(Critiqued(**place, sha256=sha, critique=second, model="other", prompt_version="1"))
        assert Dataset(LogRollouts(store), DataConfig(held_out=0, max_spread=0.5)).statistics.rewarded == 11
        with pytest.raises(UserError, match="no pairs"):
            Dataset(LogRollouts(store), DataConfig(held_out=0, max_spread=0.05)).examples("pairs")


def test_a_person_stands_above_the_model(tmp_path: Path) -> None:
    settings = write_log(tmp_path, 1)
    with open_store(settings) as store:
        rows = list(store.candidates("run-0000"))
        low, high = rows[0], rows[4]
        for place, (row, rating) in enumerate(((low, 5.0), (high, 1.0))):
            store.append(HumanFeedback(run_id="run-0000", index=place, sha256=row.sha256, rating=rating))
        (pair,) = Dataset(LogRollouts(store), ALL).examples("preferences").fetch([0])
        assert (pair.kind, pair.winner, pair.loser) == ("human", low.sha256, high.sha256)
        # A person who reads the wanted emotion from an image of round 0 makes it the best one.
        target = store.runs()[0].target
        store.append(
            HumanFeedback(
                run_id="run-0000", index=7, sha256=low.sha256, valence=target.valence, arousal=target.arousal
            )
        )
        (best,) = Dataset(LogRollouts(store), ALL).examples("bests").fetch([0])
        assert best.winner == low.sha256


def test_a_later_word_leaves_what_was_said_of_other_axes(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 1)) as store:
        rows = list(store.candidates("run-0000"))
        for number, (row, said) in enumerate((
            (rows[0], {"rating": 5.0}),
            (rows[4], {"rating": 1.0}),
            (rows[0], {"comment": "the sky is too dark"}),
            (rows[4], {"valence": -3.0}),
        )):  # fmt: skip
            store.append(HumanFeedback(run_id="run-0000", index=number, sha256=row.sha256, **said))  # type: ignore[arg-type]
        (pair,) = Dataset(LogRollouts(store), ALL).examples("preferences").fetch([0])
        assert (pair.kind, pair.winner, pair.loser) == ("human", rows[0].sha256, rows[4].sha256)


def test_a_persons_reading_is_rewarded_by_the_runs_own_reward(tmp_path: Path) -> None:
    target = EmotionTarget(valence=2.0, category=Emotion.AWE)
    with open_store(
        write_log(
            tmp_path, 2, target=target, category=Emotion.AWE, reward_name="pleased",
            reward_path="rl_log:Pleased",
        )
    ) as store:  # fmt: skip
        sha = next(store.candidates("run-0000")).sha256
        store.append(HumanFeedback(run_id="run-0000", sha256=sha, valence=2.5, arousal=0.0))
        groups = Dataset(LogRollouts(store), ALL).examples("groups").fetch(range(2))
        assert [max(it.rewards) for it in groups] == [3.5, pytest.approx(0.1, abs=0.2)]


def test_a_reward_that_sees_gets_the_picture_that_a_person_read_and_no_bare_reading(tmp_path: Path) -> None:
    target = EmotionTarget(valence=1.0)
    log = write_log(tmp_path, 2, target=target, reward_name="seeing", reward_path="rl_log:Seeing")
    with open_store(log) as store:
        sha = next(store.candidates("run-0000")).sha256
        store.append(HumanFeedback(run_id="run-0000", sha256=sha, valence=2.5, arousal=0.0))
        groups = Dataset(LogRollouts(store), ALL).examples("groups").fetch(range(2))
        light = np.asarray(store.blobs.get_image(str(sha))).mean()
        assert max(it for group in groups for it in group.rewards) == pytest.approx(2.5 + light)
        for wrong in (ALL.model_copy(update={"told": "read"}), ALL.model_copy(update={"phrases": 2})):
            with pytest.raises(
                UserError, match=r"seeing looks at the picture.*data.told=wanted and data.phrases=0"
            ):
                Dataset(LogRollouts(store), wrong)


def test_a_reward_is_looked_for_only_where_a_person_read_a_picked_run(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 2, reward_name="myr", reward_path="nowhere:Reward")) as store:
        sha = next(store.candidates("run-0000")).sha256
        store.append(HumanFeedback(run_id="run-0000", sha256=sha, comment="nice", rating=4.0))
        assert Dataset(LogRollouts(store), ALL).statistics.runs == 2
        store.append(HumanFeedback(run_id="run-0000", index=1, sha256=sha, valence=1.0))
        assert Dataset(LogRollouts(store, RunFilter(run_ids=("run-0001",))), ALL).statistics.runs == 1
        with pytest.raises(UserError, match=r"reward myr v1 is not found .*\(nowhere:Reward\): make it"):
            Dataset(LogRollouts(store), ALL)


def test_the_split_goes_by_neutral_prompt_and_stays(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 40)) as store:
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0.4))
        sides = {
            split: {
                e.prompt
                for e in dataset.examples("bests", split).fetch(range(len(dataset.examples("bests", split))))
            }
            for split in ("train", "held_out")
        }
        assert sides["train"] and sides["held_out"] and not sides["train"] & sides["held_out"]
    assert held_out("a dog", 0.5, "emoloop") == held_out("a dog", 0.5, "emoloop")
    share = np.mean([held_out(f"prompt {i}", 0.2, "emoloop") for i in range(2000)])
    assert share == pytest.approx(0.2, abs=0.03)
    # A larger share keeps what was held out before.
    assert all(held_out(f"{i}", 0.5, "x") for i in range(500) if held_out(f"{i}", 0.3, "x"))


def test_the_data_hash_follows_the_data(tmp_path: Path) -> None:
    def hash_of(home: Path, **how: object) -> str:
        with open_store(write_log(home, 3, **how)) as store:
            return Dataset(LogRollouts(store), ALL).statistics.data_hash

    same = hash_of(tmp_path / "a")
    assert same == hash_of(tmp_path / "b")
    with open_store(settings_for(tmp_path / "b")) as store:
        sha = next(store.candidates("run-0000")).sha256
        seen = [same]
        for number, said in enumerate(({"rating": 1.0}, {"rating": 2.0}, {"valence": 1.0})):
            store.append(HumanFeedback(run_id="run-0000", index=number, sha256=sha, **said))  # type: ignore[arg-type]
            seen.append(Dataset(LogRollouts(store), ALL).statistics.data_hash)
        assert len(set(seen)) == 4
    assert same != hash_of(tmp_path / "c", reward=lambda *place: default_reward(*place) + 0.001)  # type: ignore[operator]


def test_the_filter_picks_runs(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 8)) as store:
        assert Dataset(LogRollouts(store, RunFilter(prompt="boat")), ALL).statistics.runs == 1
        assert Dataset(LogRollouts(store, RunFilter(limit=3)), ALL).statistics.runs == 3
        with pytest.raises(UserError, match="answers to --from"):
            Dataset(LogRollouts(store, RunFilter(prompt="zebra")), ALL)


def test_a_run_that_still_runs_is_left_out(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 2)) as store:
        store.append(*run_events(store, 2)[:-1])
        assert len(store.runs()) == 3
        assert Dataset(LogRollouts(store), ALL).statistics.runs == 2


def test_wrong_logs_are_refused_in_one_line(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path / "empty")) as store, pytest.raises(UserError, match="is empty"):
        Dataset(LogRollouts(store))
    with (
        open_store(write_log(tmp_path / "missing", 2, reward=lambda *place: None)) as store,
        pytest.raises(UserError, match=r"all critiques are missing .the critic timed out"),
    ):
        Dataset(LogRollouts(store))
    with open_store(settings_for(tmp_path / "mixed")) as store:
        store.append(*run_events(store, 0), *run_events(store, 1, model="other"))
        with pytest.raises(UserError, match=r"2 base models \(other@r1; tiny@r1\)"):
            Dataset(LogRollouts(store))
        assert Dataset(LogRollouts(store, RunFilter(model="tiny"))).base.model == "tiny"
    with open_store(settings_for(tmp_path / "adapters")) as store:
        store.append(*run_events(store, 0), *run_events(store, 1, adapter="abcdef0123"))
        with pytest.raises(UserError, match="adapter abcdef01"):
            Dataset(LogRollouts(store))
        assert Dataset(LogRollouts(store, RunFilter(adapter="none"))).base.adapter is None
        assert Dataset(LogRollouts(store, RunFilter(adapter="abcd"))).base.adapter == "abcdef0123"
    with open_store(settings_for(tmp_path / "rewards")) as store:
        store.append(*run_events(store, 0), *run_events(store, 1, reward_name="other"))
        with pytest.raises(UserError, match="different rewards"):
            Dataset(LogRollouts(store))


def test_sources_by_keys() -> None:
    assert source_for(frozenset({"prompt", "target", "winner"})) == "bests"
    assert source_for(frozenset({"prompt", "target", "winner", "loser"})) == "preferences"
    assert source_for(frozenset({"prompt", "refined", "advantage"})) == "pairs"
    with pytest.raises(UserError, match="holds no log_probs"):
        source_for(frozenset({"prompt", "latents", "rewards", "log_probs"}))
