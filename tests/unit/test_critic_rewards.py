"""What an answer is worth, in closed form; what is missing moves no advantage; configurations; figures of a card."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from emoloop.agents.schemas import CriticAnswer
from emoloop.cli import app
from emoloop.domain import UserError
from emoloop.rl.critic.card import figures, regions
from emoloop.rl.critic.config import PRESETS, CriticConfig, commented, load_critic_config
from emoloop.rl.critic.data import Sample
from emoloop.rl.critic.rewards import neutral, read_answer, tasks
from emoloop.rl.critic.train import newest
from typer.testing import CliRunner


def answer(**fields: str) -> str:
    plain = {
        "analysis": "a grey sky",
        "valence": "+1.0",
        "arousal": "-2.0",
        "category": "awe",
        "alignment": "1.0",
    }
    return json.dumps({**plain, "suggestion": "keep", **fields})


SAMPLE = Sample(
    image=b"", name="a", valence=-0.5, arousal=-1.8, category="awe", texts={"analysis": "grey sea, a sky"}
)


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("format", 1.0),
        ("valence", 1 - 1.5 / 6),
        ("arousal", 1 - 0.2 / 6),
        ("valence_within", 0.0),
        ("arousal_within", 1.0),
        ("category", 1.0),
        ("description", 2 * 3 / (3 + 4)),
    ],
)
def test_rewards_in_closed_form(name, worth):
    [(_, weight, reward)] = tasks({name: 2.0}, threshold=0.53)
    assert weight == 2.0
    assert reward(read_answer(answer()), SAMPLE) == pytest.approx(worth)
    unlabelled = Sample(image=b"", name="b")
    assert reward(read_answer(answer()), unlabelled) == (1.0 if name == "format" else None)
    assert reward(read_answer("{ nonsense"), SAMPLE) == (0.0 if name == "format" else None), "missing, not 0"


def test_a_task_may_be_anybodys():
    [(_, _, reward)] = tasks({"emoloop.rl.critic.rewards:category": 1.0}, 0.5)
    assert reward(read_answer(answer(category="fear")), SAMPLE) == 0.0
    with pytest.raises(UserError, match="unknown reward 'valenz': did you mean 'valence'"):
        tasks({"valenz": 1.0}, 0.5)


@pytest.mark.parametrize("text", ["", "[]", answer(valence="+7.0"), answer(category="joy"), answer() + " so"])
def test_an_answer_is_one_object_in_its_ranges(text):
    assert read_answer(text) is None


def test_what_is_missing_moves_no_advantage():
    nan = math.nan
    rewards = torch.tensor(
        [[1.0, 0.8], [1.0, 0.4], [0.0, nan], [nan, nan], [1.0, nan], [0.0, nan], [1.0, nan], [1.0, nan]]
    )
    filled = neutral(rewards, 4)
    assert filled[2].tolist() == pytest.approx([0.0, 0.6]), "the group's mean"
    assert filled[3].isnan().all(), "nothing is known: TRL leaves it out"
    assert filled[4:, 1].tolist() == pytest.approx([0.6] * 4), "a whole group: the same for all"
    total = filled.nansum(1)[:3]
    assert (total - total.mean()).tolist() == pytest.approx(
        [1.8 - 1.2667, 1.4 - 1.2667, 0.6 - 1.2667], abs=1e-3
    )
    whole = torch.rand(8, 3)
    assert torch.equal(neutral(whole, 4), whole)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_whole_and_explained(name):
    config = load_critic_config(name)
    assert tasks(config.rewards, config.threshold)
    text = commented(config)
    assert load_critic_config(name, _written(text)) == config
    assert all(line.strip().startswith("#") or ":" in line for line in text.splitlines())


def _written(text: str) -> Path:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "config.yaml"
    path.write_text(text)
    return path


def test_tasks_that_are_named_are_all_the_tasks():
    config = load_critic_config("miniature", None, ["rewards={format: 1, valence: 2}", "grpo.steps=3"])
    assert config.rewards == {"format": 1.0, "valence": 2.0} and config.grpo.steps == 3
    with pytest.raises(UserError, match=r"unknown key 'grpo.step', did you mean 'grpo.steps'"):
        load_critic_config(None, None, ["grpo.step=3"])
    with pytest.raises(UserError, match="no preset 'qwen'; there are miniature, qwen25-vl-3b, qwen25-vl-7b"):
        load_critic_config("qwen")


def reading(valence: float, arousal: float, category: str = "awe") -> CriticAnswer:
    return CriticAnswer.model_validate(
        {"valence": valence, "arousal": arousal, "category": category, "alignment": 1.0}
    )


def test_figures_leave_out_what_no_label_tells():
    truths = [
        Sample(image=b"", name="a", valence=1.0, arousal=0.0),
        Sample(image=b"", name="b", category="fear"),
    ]
    found = figures([reading(2.0, -0.5), reading(0, 0)], truths)
    assert found["valence_mae"] == found["valence_bias"] == 1.0 and found["arousal_bias"] == -0.5
    assert found["mae"] == 1.5 and found["category_accuracy"] == 0.0 and found["valid"] == 1.0
    assert figures([None, reading(0, 0, "fear")], truths) == {
        "valid": 0.5,
        "n": 2.0,
        "category_accuracy": 1.0,
    }


def test_regions_are_by_label():
    truths = [Sample(image=b"", name=str(v), valence=v, arousal=-3.0) for v in (-2.0, -2.5, 3.0)]
    low, high = regions([reading(-1.0, -3.0), reading(-2.5, -3.0), reading(3.0, -2.0)], truths)
    assert (low["valence"], low["arousal"], low["n"], low["mae"]) == (-2.4, -2.4, 2, 0.5)
    assert low["valence_bias"] == 0.5 and high["arousal_bias"] == 1.0


def test_a_torn_checkpoint_goes(tmp_path):
    for step, state in ((50, "{}"), (100, "{}"), (150, '{"glob'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert newest(tmp_path) == tmp_path / "checkpoint-100"
    assert sorted(it.name for it in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-50"]
    assert newest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "train critic needs DATA"),
        (["DATA"], "train critic needs --out DIR"),
        (["DATA", "--out", "OUT"], "one table (.jsonl, .csv, .parquet) is wanted"),
        (["DATA", "--out", "OUT", "--set", "rewards={joy: 1}"], "unknown reward 'joy'"),
        (["DATA", "--out", "OUT", "--set", "model=none"], "one table (.jsonl, .csv, .parquet) is wanted"),
    ],
)
def test_wrong_words_end_in_one_line(tmp_path, words, said):
    data = tmp_path / "data"
    data.mkdir()
    given = [
        str(data) if word == "DATA" else str(tmp_path / "out") if word == "OUT" else word for word in words
    ]
    done = CliRunner().invoke(app, ["train", "critic", *given])
    assert isinstance(done.exception, UserError) and said in str(done.exception), done.output
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_papers_tasks():
    assert set(CriticConfig().rewards) == {"format", "valence", "arousal", "category", "description"}
