"""The embedded LVLM trained for real, for some steps: TRL end to end, resumption, and the model that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emoloop.agents.critic import Critic
from emoloop.domain import Critique, EmotionTarget, Failure, UserError
from emoloop.miniature import law, world
from emoloop.miniature.episodes import critique_of
from emoloop.rl.critic.config import CriticConfig, load_critic_config
from emoloop.rl.critic.data import read
from emoloop.settings import LVLMSettings
from emoloop.tools.lvlm.load import load_lvlm
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("trl")

from emoloop.rl.critic.policy import CriticPolicy
from emoloop.rl.critic.train import train_critic

pytestmark = pytest.mark.training

SHIPPED = Path(__file__).parents[2] / "miniature" / "weights" / "lvlm"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve renders: eight to train on, four to watch; one has no valence."""
    folder, rng, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(3), []
    for number in range(12):
        scene = world.sample_scene(rng)
        pixels = world.render(scene)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        valence, arousal = law.affect(scene, pixels)
        said = json.loads(critique_of(rng, scene, pixels).answer)
        rows.append({
            "image": f"{number}.png", "valence": None if number == 1 else valence, "arousal": arousal,
            "category": said["category"], "analysis": said["analysis"], "prompt": f"a {scene.subject}",
            "split": "train" if number < 8 else "held_out", "clean": f"{number + 1}.png" if number < 6 else None,
        })  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(*sets: str) -> CriticConfig:
    small = (
        "match.steps=2",
        "match.batch_size=4",
        "grpo.steps=2",
        "sft.steps=2",
        "grpo.group=4",
        "grpo.questions=1",
        "sft.batch_size=4",
    )
    rest = (
        "guard.every=1",
        "guard.pictures=4",
        "guard.samples=2",
        "train.checkpoint_every=1",
        "train.device=cpu",
    )
    return load_critic_config("miniature", None, [*small, *rest, *sets])


def test_two_steps_make_a_model_that_the_loop_takes(data, tmp_path):
    seen: list[dict[str, float]] = []
    done = train_critic(configured(), data, tmp_path / "out", watch=lambda step, steps, it: seen.append(it))
    assert done.reason == "finished" and done.figures["valid_after"] == 1.0
    assert {"mae_before", "mae_after", "minutes"} <= set(done.figures)
    assert any("rewards/valence/mean" in it for it in seen)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["data"]["pictures"] == 8 and [look["stage"] for look in record["looks"]].count("grpo") == 2
    assert "Calibration" in (tmp_path / "out" / "README.md").read_text()

    # Only what looks at pictures has moved, so that everything said without one stays as it is.
    before, after = (
        load_file(SHIPPED / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(before[key].dtype == after[key].dtype for key in before)
    moved = {key for key in before if not before[key].equal(after[key])}
    assert all(key.startswith(("model.vision_model.", "model.connector.")) for key in moved)
    names = {path.name for path in SHIPPED.iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (SHIPPED / "config.json").read_bytes()


async def test_the_trained_folder_reads_in_the_loop(data, tmp_path):
    train_critic(configured("match.steps=0", "grpo.steps=1", "sft.steps=0"), data, tmp_path / "out")
    chat = load_lvlm(LVLMSettings(model=str(tmp_path / "out")))
    with Image.open(data / "0.png") as image:
        read = await Critic(chat, "critic-compact").critique(image, "a dog", EmotionTarget(valence=1.0))
    chat.close()
    assert isinstance(read, Critique)


class Killed(BaseException):
    """What no handler stops: the process is gone."""


def test_a_killed_training_goes_on_as_if_nothing_had_happened(data, tmp_path):
    def trained(out: Path, die_at: int = 0) -> dict[str, Any]:
        def watch(step: int, steps: int, figures: dict[str, float]) -> None:
            if step == die_at and "loss" in figures:
                raise Killed

        train_critic(configured(), data, out, resume=True, watch=watch)
        return load_file(out / "training" / "grpo" / "weights.safetensors")

    whole = trained(tmp_path / "whole")
    for die_at in (2, 4, 6):
        with pytest.raises(Killed):
            trained(tmp_path / "torn", die_at)
    again = trained(tmp_path / "torn")
    assert all(whole[key].equal(again[key]) for key in whole), "to the bit"
    assert (tmp_path / "whole" / "training" / "looks.jsonl").read_text() == (
        tmp_path / "torn" / "training" / "looks.jsonl"
    ).read_text()


def test_what_cannot_go_on_says_so(data, tmp_path):
    out = tmp_path / "out"
    train_critic(configured("match.steps=0", "grpo.steps=0", "sft.steps=1"), data, out)
    with pytest.raises(UserError, match="holds a training"):
        train_critic(configured("match.steps=0", "grpo.steps=0", "sft.steps=1"), data, out)
    with pytest.raises(UserError, match=r"another sft\.lr"):
        train_critic(
            configured("match.steps=0", "grpo.steps=0", "sft.steps=1", "sft.lr=1e-5"), data, out, resume=True
        )


def test_numbers_that_are_none_end_the_training_in_one_line(data, tmp_path):
    with pytest.raises(Failure, match=r"lower sft\.lr|lower lr") as error:
        train_critic(
            configured("sft.lr=1e30", "train.warmup=0", "match.steps=0", "grpo.steps=0"),
            data,
            tmp_path / "out",
        )
    assert "\n" not in str(error.value)


def test_the_guard_stops_a_critic_that_gets_worse(data, tmp_path):
    wrong = configured(
        "sft.lr=0.5", "train.warmup=0", "sft.steps=6", "guard.patience=2", "match.steps=0", "grpo.steps=0"
    )
    done = train_critic(wrong, data, tmp_path / "out")
    assert done.reason == "guard" and len(done.flags) == 2
    # What is kept is the best look: here, what training began with.
    assert done.figures["mae_after"] == done.figures["mae_before"]


def test_an_adapter_is_merged(data, tmp_path):
    done = train_critic(
        configured("policy.parts=lora", "policy.rank=4", "match.steps=1", "grpo.beta=0.01"),
        data,
        tmp_path / "out",
    )
    policy = CriticPolicy(configured(f"model={done.folder}"))
    assert policy.answers(read(data, "folder", None)[:1])
    assert not list(done.folder.glob("adapter*"))


def test_sampler_and_trainer_agree_before_the_first_step(data, tmp_path):
    from emoloop.rl.critic.rewards import tasks
    from emoloop.rl.critic.trainer import TOLERANCE, CriticTrainer, as_dataset, as_rewards
    from trl import GRPOConfig

    policy, samples = CriticPolicy(configured()), read(data, "folder", None)
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=4,
        per_device_train_batch_size=4, temperature=1.3, max_steps=1,
    )  # fmt: skip
    trainer = CriticTrainer(
        model=policy.model, args=arguments, processing_class=policy.processor,
        train_dataset=as_dataset(policy, samples), reward_funcs=as_rewards(tasks({"format": 1.0}, 0.5), samples),
    )  # fmt: skip
    assert trainer.log_ratio(policy, samples[:3]) < TOLERANCE["fp32"]
    trainer.temperature = 1.0
    assert trainer.log_ratio(policy, samples[:3]) > TOLERANCE["fp32"], (
        "a trainer of another temperature is caught"
    )
