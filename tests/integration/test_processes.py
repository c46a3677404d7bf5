"""Training by two processes that `accelerate launch` starts (gloo, CPU) against one at the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import online_helpers
import pytest
import rl_log
import tiny
import torch
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.rl.launch import FSDP2
from emoloop.settings import Settings
from emoloop.tools.diffusion.adapter import load_artifact
from emoloop.tools.images.pipelines import load_pipeline
from emoloop.traces.store import open_store
from safetensors.torch import load_file

pytestmark = pytest.mark.training

#: Largest difference of a weight, of which a step moves one by .01 at most; of Flow-GRPO 2e-5 was measured.
TOLERANCE, TOLERANCE_ONLINE = 1e-6, 1e-4

QUICK = (
    "train.steps=4", "train.batch_size=2", "train.checkpoint_every=2", "train.tensorboard=false", "train.device=cpu",
    "train.lr=0.01", "guard.every=0", "policy.rank=4", "policy.dropout=0.1", "data.held_out=0.3",
)  # fmt: skip
TWICE = "train.accumulation=2"


def reading(round_: int, index: int) -> tuple[float, float]:
    return 0.4 * round_ + 0.1 * index, -0.3 * round_


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("world")
    folder = tiny.save("sd3", root / "model")
    rl_log.write_log(root / "home", 10, model=str(folder), revision=None, reading=reading)
    return rl_log.settings_for(root / "home", generator={"model": str(folder)})


def launch(*words: str, fsdp: bool = False) -> subprocess.CompletedProcess[str]:
    # `--multi_gpu` is how accelerate's launcher is told to start several; `train.device=cpu` makes them gloo's.
    how = (
        ["--config_file", str(FSDP2)]
        if fsdp
        else ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    )
    start = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", *how]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    command = [sys.executable, *start, *words]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:  # fmt: skip
        try:
            out, told = process.communicate(timeout=300)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, told)


def script(*tasks: dict[str, Any], **how: Any) -> subprocess.CompletedProcess[str]:
    return launch(str(Path(tiny.__file__).with_name("launched.py")), json.dumps(tasks), **how)


def task(settings: Settings, objective: str, out: Path, sets: Sequence[str], **how: Any) -> dict[str, Any]:
    given = {"home": str(settings.home), "generator": {"model": settings.generator.model}}
    return {"objective": objective, "out": str(out), "settings": given, "sets": list(sets), **how}


def apart(one: Path, other: Path) -> float:
    found = [
        {
            f"{file.name}:{key}": value.numpy()
            for file in sorted(folder.glob("*.safetensors"))
            for key, value in load_file(file).items()
        }
        for folder in (one, other)
    ]
    assert found[0].keys() == found[1].keys() and found[0]
    assert any("lora_B" in key and value.any() for key, value in found[0].items())
    return max(float(np.abs(found[0][key] - found[1][key]).max()) for key in found[0])


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_the_command_equals_one_process_and_tells_once(settings: Settings, tmp_path: Path) -> None:
    # The preset that fits the pipeline's class, with its average of the weights and gradient checkpointing.
    knobs = [*QUICK, "train.precision=fp32", "train.accumulation=1"]
    words = ["--out", str(tmp_path / "two"), "--home", str(settings.home)]
    words += [word for knob in knobs for word in ("--set", knob)]
    done = launch("-m", "emoloop.cli", "distill", "opd", "--json", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["steps"] == 4
    distill(settings, load_config("opd", "sd35-medium", sets=[*knobs, TWICE]), tmp_path / "one")
    assert apart(tmp_path / "one", tmp_path / "two") <= TOLERANCE
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_every_objective_equals_one_process(settings: Settings, tmp_path: Path) -> None:
    knobs, names = [*QUICK, "train.steps=2"], ("sft", "rwr", "nft", "npo", "contrast")
    done = script(*(task(settings, name, tmp_path / name, knobs) for name in names))
    assert done.returncode == 0, done.stderr
    for name in names:
        distill(settings, load_config(name, sets=[*knobs, TWICE]), tmp_path / f"{name}-one")
        assert apart(tmp_path / f"{name}-one", tmp_path / name) <= 10 * TOLERANCE, name  # of npo 4e-6


def test_a_killed_training_goes_on_and_flow_grpo_samples_in_shares(
    settings: Settings, tmp_path: Path
) -> None:
    killed = script(task(settings, "dpo", tmp_path / "dpo", QUICK, kill_at=3))
    assert killed.returncode != 0
    assert [it.name for it in (tmp_path / "dpo/training/checkpoints").iterdir()] == ["step-0000002"]
    homes = {name: rl_log.settings_for(tmp_path / name, generator={"model": settings.generator.model})
             for name in ("home-two", "home-one")}  # fmt: skip
    online = ["train.batch_size=4", "train.steps=4"]
    done = script(
        task(settings, "dpo", tmp_path / "dpo", QUICK, resume=True),
        task(homes["home-two"], "flow-grpo", tmp_path / "grpo", online, interrupt_at=1),
        task(homes["home-two"], "flow-grpo", tmp_path / "grpo", online, resume=True),
    )
    assert done.returncode == 0, done.stderr
    distill(settings, load_config("dpo", sets=[*QUICK, TWICE]), tmp_path / "dpo-one")
    assert apart(tmp_path / "dpo-one", tmp_path / "dpo") <= TOLERANCE
    assert losses(tmp_path / "dpo") == pytest.approx(losses(tmp_path / "dpo-one"), rel=1e-4)
    # Its runs bear its name, which seeds nothing.
    online_helpers.run(homes["home-one"], tmp_path / "grpo-one", *online, TWICE)
    assert apart(tmp_path / "grpo-one", tmp_path / "grpo") <= TOLERANCE_ONLINE
    assert losses(tmp_path / "grpo") == pytest.approx(losses(tmp_path / "grpo-one"), rel=1e-3, abs=1e-4)
    # One process logs what both sampled, nothing twice, though the second collection was made twice.
    pictures = []
    for settings_ in homes.values():
        with open_store(settings_, read_only=True) as store:
            runs = sorted(store.runs(), key=lambda run: run.run_id)
            pictures.append([sorted(row.sha256 for row in store.candidates(run.run_id)) for run in runs])
    assert all([len(it) for it in runs] == [4] * 4 for runs in pictures)
    assert pictures[0][:2] == pictures[1][:2]  # before the first step


def test_fsdp_splits_the_network_and_leaves_the_same_artifact(settings: Settings, tmp_path: Path) -> None:
    sets = [*QUICK, "train.steps=2", "train.checkpoint_every=1"]
    done = script(task(settings, "opd", tmp_path / "two", sets), fsdp=True)
    assert done.returncode == 0, done.stderr
    distill(settings, load_config("opd", sets=[*sets, TWICE]), tmp_path / "one")
    assert apart(tmp_path / "one", tmp_path / "two") <= TOLERANCE
    pipe = load_pipeline(Path(settings.generator.model), torch.float32)
    assert load_artifact(pipe, tmp_path / "two", call=tiny.DEFAULTS["sd3"]["call"]).emotion_tokens is not None
