"""Distillation as a whole on a tiny pipeline: artifacts, resumption after kill -9, errors, guards, round two."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_helpers
import numpy as np
import pytest
import rl_log
import tiny
import torch
from accelerate import Accelerator
from emoloop.cli import app
from emoloop.domain import EmotionTarget, Failure, UserError
from emoloop.rl import checkpoint, policy, trainer
from emoloop.rl.config import load_config
from emoloop.rl.data.dataset import Examples
from emoloop.rl.data.loader import Order
from emoloop.rl.distill import Distilled, distill
from emoloop.rl.warm_start import BATCH
from emoloop.settings import Settings
from emoloop.tools.diffusion.adapter import load_artifact
from emoloop.tools.diffusion.families import family_of
from emoloop.tools.images.load import load_generator
from emoloop.tools.images.pipelines import load_pipeline
from emoloop.traces.rows import RunFilter
from emoloop.traces.store import open_store
from safetensors.torch import load_file
from typer.testing import CliRunner

QUICK = (
    "train.steps=6", "train.batch_size=2", "train.checkpoint_every=2", "train.tensorboard=false",
    "train.device=cpu", "train.lr=0.01", "guard.every=0", "policy.rank=4", "policy.alpha=8", "data.held_out=0.3",
)  # fmt: skip


def reading(round_: int, index: int) -> tuple[float, float]:
    return 0.4 * round_ + 0.1 * index, -0.3 * round_


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    root = tmp_path_factory.mktemp("world")
    folder = tiny.save("sd3", root / "model")
    return rl_log.write_log(root / "home", 10, model=str(folder), revision=None, reading=reading), folder


def run(world: tuple[Settings, Path], out: Path, objective: str = "opd", *more: str, **how: Any) -> Distilled:
    return distill(world[0], load_config(objective, sets=[*QUICK, *more]), out, **how)


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor's bits; the files' headers have no order of their own."""
    names = ("pytorch_lora_weights.safetensors", "emotion_tokens.safetensors")
    return {
        f"{name}:{key}": tensor.numpy().tobytes()
        for name in names
        for key, tensor in load_file(folder / name).items()
    }


def picture(pipe: Any, target: torch.Tensor | None = None, tokens: Any = None) -> np.ndarray:
    family = family_of(pipe, tiny.DEFAULTS["sd3"]["call"])
    embeds = family.encode("a dog")
    if tokens is not None:
        embeds = tokens(embeds, {"target": target})
    return pipe(
        **family.arguments(embeds, None), num_inference_steps=2, guidance_scale=1.0, height=32, width=32,
        generator=torch.Generator().manual_seed(0), output_type="np", **family.call,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("objective", ["opd", "dpo", "nft", "rwr", "sft"])
def test_each_objective_leaves_an_artifact_that_works(
    objective: str, world: tuple[Settings, Path], tmp_path: Path
) -> None:
    result = run(world, tmp_path / "out", objective, "objective.hold_fraction=0.5", "train.ema=0.5")
    assert result.outcome.reason == "finished" and result.outcome.steps == 6
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["data"]["data_hash"] == result.statistics["data_hash"]
    assert record["critics"] == ["l"]
    assert record["config"]["train"]["lr"] == 0.01 and record["reward"] == {"name": "emotion", "version": "1"}
    lines = [json.loads(line) for line in (tmp_path / "out/training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)

    ours, plain = (load_pipeline(world[1], torch.float32) for _ in range(2))
    for pipe in (ours, plain):
        pipe.set_progress_bar_config(disable=True)
    base = picture(ours)
    adapter = load_artifact(ours, tmp_path / "out", call=tiny.DEFAULTS["sd3"]["call"])
    plain.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
    # Alpha is not the rank here, so a lost adapter config would show.
    assert np.array_equal(picture(ours), picture(plain))
    assert np.abs(picture(ours) - base).max() > 1e-3
    calm, stirred = (torch.tensor([[1.0, arousal]]) for arousal in (-2.0, 2.0))
    assert adapter.emotion_tokens is not None
    assert not np.array_equal(
        picture(ours, calm, adapter.emotion_tokens), picture(ours, stirred, adapter.emotion_tokens)
    )


@pytest.mark.training
@pytest.mark.parametrize(
    ("objective", "own", "kills"),
    [
        ("opd", [], (1, 3, 5)),
        ("opd", ["data.phrases=2", "train.text_steps=3"], (2, 4)),
        ("nft", ["objective.old=slow"], (3,)),
        ("dpo", ["objective.draws=2"], (4,)),
    ],
)
def test_killed_and_resumed_equals_undisturbed_to_the_bit(
    objective: str, own: list[str], kills: tuple[int, ...], world: tuple[Settings, Path], tmp_path: Path
) -> None:
    more = ["train.ema=0.9", "policy.dropout=0.1", "train.accumulation=2", "objective.time_sampling=uniform"]
    more += own
    run(world, tmp_path / "undisturbed", objective, *more)
    out = tmp_path / "killed"
    # Forked from a server that has the imports and nothing else: a fork of this process would inherit locks of
    # torch's threads, and each fresh one would import for seconds.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["emoloop.rl.distill"])
    for at in kills:
        child = server.Process(
            target=distill_helpers.distil_until_killed,
            args=(world[0], objective, [*QUICK, *more], out, at),
        )
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
    run(world, out, objective, *more, resume=True)
    assert weights(out) == weights(tmp_path / "undisturbed")
    before, after = (
        (folder / "training/metrics.jsonl").read_text() for folder in (tmp_path / "undisturbed", out)
    )

    def figures(text: str) -> list[tuple[int, float]]:
        return [
            (it["step"], it.get("loss", it.get("text_loss"))) for it in map(json.loads, text.splitlines())
        ]

    assert figures(before) == figures(after)


def test_a_phrasebook_with_a_start_on_text_leaves_an_artifact(
    world: tuple[Settings, Path], tmp_path: Path
) -> None:
    found = run(world, tmp_path / "out", "opd", "data.phrases=2", "train.text_steps=40")
    assert found.statistics["phrasebook"] == {" bright 1": found.statistics["sources"]["phrases"]["train"]
                                              + found.statistics["sources"]["phrases"]["held_out"]}  # fmt: skip
    first = json.loads((tmp_path / "out/training/metrics.jsonl").read_text().splitlines()[0])
    # 2 is where it begins: nothing of the way from the neutral prompt to the refined one, words and pooled.
    assert first["step"] == 0 and first["text_loss"] < 1.5
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["source"] == "phrases" and record["data"]["reader_error"]
    with pytest.raises(UserError, match=r"policy\.extra_tokens=0"):
        run(world, tmp_path / "extra", "opd", "train.text_steps=3", "policy.extra_tokens=2")


@pytest.mark.parametrize("objective", ["dpo", "nft", "rwr", "sft"])
def test_every_objective_may_start_on_text(
    objective: str, world: tuple[Settings, Path], tmp_path: Path
) -> None:
    run(world, tmp_path / "out", objective, "data.phrases=2", "train.text_steps=40", "train.steps=1")
    first = json.loads((tmp_path / "out/training/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["text_loss"] < 1.5


def test_tokens_are_trained_alone_and_a_lora_without_a_text_residual(
    world: tuple[Settings, Path], tmp_path: Path
) -> None:
    run(world, tmp_path / "tokens", "opd", "train.text_steps=3", "train.lr=0", "train.emotion_lr=0.01")
    found = weights(tmp_path / "tokens")
    assert all(not any(bits) for name, bits in found.items() if "lora_B" in name)
    pipe = load_pipeline(world[1], torch.float32)
    load_artifact(pipe, tmp_path / "tokens", call=tiny.DEFAULTS["sd3"]["call"])
    run(world, tmp_path / "lora", "opd", "policy.emotion_rank=0")
    pipe = load_pipeline(world[1], torch.float32)
    tokens = load_artifact(pipe, tmp_path / "lora", call=tiny.DEFAULTS["sd3"]["call"]).emotion_tokens
    told = family_of(pipe, tiny.DEFAULTS["sd3"]["call"]).encode("a dog")
    assert tokens is not None
    said = tokens(told, {"target": torch.tensor([[2.0, 1.0]])})
    assert torch.equal(said.prompt, told.prompt) and not torch.equal(said.pooled, told.pooled)


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_checkpoint(
    world: tuple[Settings, Path], tmp_path: Path
) -> None:
    distill_helpers.TurnsToNaN.calls[0] = 0
    with pytest.raises(Failure, match=r"became nan at step 5; the last good checkpoint is step-0000004"):
        run(world, tmp_path / "out", "distill_helpers:TurnsToNaN", "objective.after=5")
    assert not (tmp_path / "out/training.json").exists()
    distill_helpers.TurnsToNaN.calls[0] = -100
    run(world, tmp_path / "out", "distill_helpers:TurnsToNaN", "objective.after=5", resume=True)
    run(world, tmp_path / "sft", "sft")
    assert weights(tmp_path / "out") == weights(tmp_path / "sft")


def test_gradients_that_are_no_numbers_never_reach_the_weights(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: steps.append(1))
    with pytest.raises(Failure, match=r"gradients' norm became nan at step 0; there is no checkpoint"):
        run(world, tmp_path / "out", "distill_helpers:BadGradient")
    assert not steps


def test_a_full_disk_leaves_the_last_checkpoint(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = torch.save, [1]

    def full(state: Any, file: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        write(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        Failure, match=r"step 4 .*No space left on device; the last good checkpoint is step-0000002"
    ):
        run(world, tmp_path / "out", "sft")
    monkeypatch.undo()
    found = list((tmp_path / "out/training/checkpoints").iterdir())
    assert [it.name for it in found] == ["step-0000002"]
    run(world, tmp_path / "out", "sft", resume=True)
    run(world, tmp_path / "whole", "sft")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": torch.tensor(float(step))}, keep=2)
    (tmp_path / "step-0000002/state.pt").write_bytes(b"torn")
    state = checkpoint.load_latest(tmp_path)
    assert state is not None and state["step"] == 1
    assert checkpoint.load_latest(tmp_path / "nothing") is None


def test_only_as_many_checkpoints_stay_as_asked_for(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {}, keep=2)
    assert [it.name for it in sorted(tmp_path.iterdir())] == ["step-0000004", "step-0000005"]


def test_guards_stop_a_training_that_hacks_its_reward(world: tuple[Settings, Path], tmp_path: Path) -> None:
    guard = (
        "guard.every=2", "guard.model=distill_helpers:Collapsing", "guard.prompts=1", "guard.seeds=2",
        "guard.sheet_every=2",
    )  # fmt: skip
    stopped = run(world, tmp_path / "stop", "sft", *guard, "guard.action=stop").outcome
    assert (stopped.reason, stopped.steps) == ("guard", 2)
    flagged = run(world, tmp_path / "flag", "sft", *guard, "guard.action=flag").outcome
    assert flagged.reason == "finished" and len(flagged.flags) == 3
    assert "alignment" in flagged.flags[0]
    assert sorted(p.name for p in (tmp_path / "flag/training/samples").iterdir())[1] == "step-0000002.png"
    record = json.loads((tmp_path / "flag/training.json").read_text())
    assert record["outcome"]["flags"] == flagged.flags and set(record["outcome"]["yardstick"]) == {
        "base",
        "teacher",
    }


def test_pixel_guards_need_no_recogniser(world: tuple[Settings, Path], tmp_path: Path) -> None:
    outcome = run(world, tmp_path / "o", "sft", "guard.every=3", "guard.prompts=1", "guard.seeds=2").outcome
    grids = {f"grid_{period}" for period in (8, 12, 14, 16)}
    assert set(outcome.last_look) - {"tokens_kept"} == {"colourfulness", "edge_density", "diversity", *grids}
    looks = [
        json.loads(x) for x in (tmp_path / "o/training/metrics.jsonl").read_text().splitlines() if "look" in x
    ]
    assert [look["step"] for look in looks] == [0, 3, 6] and "held_out_loss" in looks[0]


def test_a_training_older_than_a_knob_goes_on(world: tuple[Settings, Path], tmp_path: Path) -> None:
    run(world, tmp_path / "out", "sft")
    before, file = weights(tmp_path / "out"), tmp_path / "out" / "training" / "config.yaml"
    text = file.read_text()
    file.write_text(re.sub(r"  text_steps: .*\n", "", text))
    assert file.read_text() != text
    run(world, tmp_path / "out", "sft", resume=True)
    assert weights(tmp_path / "out") == before
    with pytest.raises(UserError, match=r"another train\.text_steps"):
        run(world, tmp_path / "out", "sft", "train.text_steps=3", resume=True)


def test_an_adapter_is_sampled_with_the_guidance_that_it_was_made_for(
    world: tuple[Settings, Path], tmp_path: Path
) -> None:
    run(world, tmp_path / "out", "sft", "policy.guidance=2.5")

    def guidance(**settings: Any) -> float:
        wanted = world[0].generator.model_copy(update={"adapter": str(tmp_path / "out"), **settings})
        return load_generator(str(world[1]), wanted).describe()["guidance"]

    base = guidance(adapter=None)
    assert base != 2.5
    assert guidance() == 2.5
    assert guidance(guidance=1.5) == 1.5
    assert guidance(adapter_scale=0.0) == base


def test_early_stop_on_the_held_out_loss(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(trainer.Trainer, "_held_out_loss", lambda self: next(losses))
    outcome = run(
        world, tmp_path / "o", "sft", "guard.every=1", "guard.patience=2", "guard.prompts=1", "guard.seeds=2",
        "guard.sheet_every=0",
    ).outcome  # fmt: skip
    assert (outcome.reason, outcome.steps) == ("held_out_loss", 3)


def test_round_two_starts_from_round_one(world: tuple[Settings, Path], tmp_path: Path) -> None:
    run(world, tmp_path / "one", "sft")
    pipe = load_pipeline(world[1], torch.float32)
    adapter = load_artifact(pipe, tmp_path / "one", call=tiny.DEFAULTS["sd3"]["call"])
    log: dict[str, Any] = {
        "model": str(world[1]),
        "revision": None,
        "adapter": adapter.id,
        "reading": reading,
    }
    settings = rl_log.write_log(tmp_path / "home", 10, **log)
    second = (settings, world[1])
    with pytest.raises(UserError, match=r"made with adapter .*policy\.previous=DIR"):
        run(second, tmp_path / "two", "opd")
    # A phrasebook and a start on text as well: the first round's tokens have nothing to choose among.
    more = [f"policy.previous={tmp_path / 'one'}", "data.phrases=2", "train.text_steps=3"]
    result = run(second, tmp_path / "two", "opd", *more, resume=True)
    assert result.outcome.steps == 6
    assert weights(tmp_path / "two") != weights(tmp_path / "one")
    record = json.loads((tmp_path / "two/training.json").read_text())
    assert record["base"]["adapter"] == adapter.id and record["base"]["model"] == str(world[1])
    with pytest.raises(UserError, match="made without an adapter"):
        run(world, tmp_path / "three", "opd", f"policy.previous={tmp_path / 'one'}")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_refused(
    device: str, world: tuple[Settings, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"train\.device {device}"):
        run(world, tmp_path / "out", "sft", f"train.device={device}")
    assert not (tmp_path / "out").exists()


def test_what_is_refused_takes_no_folder(world: tuple[Settings, Path], tmp_path: Path) -> None:
    unfit = ("train.text_steps=2", "policy.extra_tokens=2")
    for knobs in (("train.seed=-1",), ("train.betas=[0.9,1.5]",), ("train.lr=.inf",), unfit):
        with pytest.raises(UserError):
            run(world, tmp_path / "out", "sft", *knobs)
    assert run(world, tmp_path / "out", "sft", "train.steps=1").outcome.reason == "finished"


def test_a_split_that_holds_nothing_out_is_told(world: tuple[Settings, Path], tmp_path: Path) -> None:
    told: list[str] = []
    more = ["data.held_out=0.01", "guard.every=1", "train.steps=1"]
    found = run(world, tmp_path / "out", "sft", *more, warn=told.append)
    (note,) = told
    assert re.match(r"none of the \d+ neutral prompts is held out \(data\.held_out=0\.01\)", note)
    assert "no held-out loss, no guard, no sample sheet" in note
    assert found.notes == json.loads((tmp_path / "out/training.json").read_text())["notes"] == told
    run(world, tmp_path / "held", "sft", "guard.every=1", "guard.prompts=1", "guard.seeds=2", "train.steps=1",
        warn=told.append)  # fmt: skip
    assert len(told) == 1


def test_the_held_out_loss_has_no_dropout(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, set[float]]] = []
    student = policy.Policy.student

    def watched(self: Any, *args: Any) -> Any:
        dropouts = [it for it in self.trained.modules() if isinstance(it, torch.nn.Dropout)]
        seen.append((torch.is_grad_enabled(), {it.p for it in dropouts if it.training and it.p == 0.5}))
        return student(self, *args)

    monkeypatch.setattr(policy.Policy, "student", watched)
    run(world, tmp_path / "out", "sft", "policy.dropout=0.5", "guard.every=1", "guard.prompts=1", "guard.seeds=2",
        "train.steps=1")  # fmt: skip
    assert seen == [(False, set()), (True, {0.5}), (False, set())]


def test_after_a_start_on_text_the_slow_teacher_is_the_student(
    world: tuple[Settings, Path], tmp_path: Path
) -> None:
    def same(step: int, steps: int, figures: dict[str, float]) -> None:
        assert figures["drift"] == 0

    more = ["data.phrases=2", "train.text_steps=3", "train.steps=1", "train.ema=0.5"]
    run(world, tmp_path / "out", "distill_helpers:WatchesSlow", *more, watch=same)


def test_wrong_input_is_one_clear_line(world: tuple[Settings, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="binds no layer"):
        run(world, tmp_path / "a", "opd", "policy.targets=[nowhere]")
    run(world, tmp_path / "b", "sft")
    with pytest.raises(UserError, match="holds a training"):
        run(world, tmp_path / "b", "sft")
    with pytest.raises(UserError, match=r"another train\.lr \(0\.01 then, 0\.02 now\)"):
        run(world, tmp_path / "b", "sft", "train.lr=0.02", resume=True)
    with pytest.raises(UserError, match="the log has changed"):
        run(world, tmp_path / "b", "sft", resume=True, where=RunFilter(limit=9))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        run(world, tmp_path / "c", "sft")
    other = rl_log.write_log(tmp_path / "home", 3, model=str(world[1]), revision="0" * 40)
    with pytest.raises(UserError, match="at revision 000000000000"):
        run((other, world[1]), tmp_path / "d", "sft")
    for text, message in (
        ("train.stpes=3", "did you mean 'train.steps'"),
        ("train.lr=-1", "train.lr: Input should be greater than or equal to 0"),
        ("train", "KEY=VALUE is wanted"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("opd", sets=[text])
    with pytest.raises(UserError, match="no preset 'miniatur'"):
        load_config("opd", preset="miniatur")


def test_order_is_a_permutation_each_epoch_and_needs_no_memory() -> None:
    order = Order(7, seed=3)
    taken = order.take(0, 21)
    assert sorted(taken[:7]) == sorted(taken[7:14]) == list(range(7))
    assert taken[:7] != taken[7:14]
    assert Order(7, seed=3).take(9, 5) == taken[9:14]
    assert Order(7, seed=4).take(0, 7) != taken[:7]


def test_latents_are_encoded_once(world: tuple[Settings, Path], tmp_path: Path) -> None:
    cache = f"train.cache={tmp_path / 'cache'}"
    run(world, tmp_path / "one", "sft", cache)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert files
    run(world, tmp_path / "two", "rwr", cache)
    run(world, tmp_path / "three", "sft", cache, "train.seed=0")
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert weights(tmp_path / "one") == weights(tmp_path / "three")
    victim = next(iter(files))
    victim.write_bytes(b"torn")
    run(world, tmp_path / "four", "sft", cache)
    assert load_file(victim)
    # What is encoded again comes in another batch, which some builds of torch round otherwise.
    name = "pytorch_lora_weights.safetensors"
    one, four = (load_file(tmp_path / folder / name) for folder in ("one", "four"))
    torch.testing.assert_close(four, one, rtol=0, atol=1e-4)


def test_command_line(world: tuple[Settings, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    home = ["--home", str(world[0].home), "--preset", "miniature"]
    shown = runner.invoke(app, ["distill", "opd", "--dry-run", *home])
    assert shown.exit_code == 0 and "10 runs" in shown.output and "← this objective" in shown.output
    answer = runner.invoke(app, ["distill", "dpo", "--dry-run", "--json", "--from", "gain=0,limit=4", *home])
    document = json.loads(answer.stdout)
    assert document["source"] == "preferences" and document["data"]["runs"] == 4
    sets = [word for item in QUICK for word in ("--set", item)]
    out = tmp_path / "out"
    answer = runner.invoke(app, ["distill", "sft", "--out", str(out), "--json", *sets, *home])
    document = json.loads(answer.stdout)
    assert document["figures"]["steps"] == 6 and document["reason"] == "finished"
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    for words, message in (
        (["distill", "opd", *home], "needs --out"),
        (["distill", "opd", "--dry-run", "--from", "colour=red", *home], "want KEY=VALUE"),
        (["distill", "opd", "--dry-run", "--from", "valence=high", *home], "--where valence"),
        (["distill", "opd", "--dry-run", "--home", str(tmp_path / "none")], "no traces"),
    ):
        failed = runner.invoke(app, words)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)


def test_interrupted_training_goes_on(world: tuple[Settings, Path], tmp_path: Path) -> None:
    def interrupt(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = run(world, tmp_path / "out", "sft", watch=interrupt)
    assert (stopped.outcome.reason, stopped.outcome.steps) == ("interrupted", 3)
    assert not (tmp_path / "out/training.json").exists()
    run(world, tmp_path / "out", "sft", resume=True)
    run(world, tmp_path / "whole", "sft")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_start_on_text_is_kept_and_can_be_stopped(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["data.phrases=2", "train.text_steps=3"]
    run(world, tmp_path / "whole", "opd", *more)
    fetch, taught = Examples.fetch, []

    def counted(self: Examples, rows: Any, rng: Any = None) -> Any:
        if len(rows) == BATCH:
            taught.append(rows)
            if len(taught) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return fetch(self, rows, rng)

    monkeypatch.setattr(Examples, "fetch", counted)
    stopped = run(world, tmp_path / "out", "opd", *more)
    assert (stopped.outcome.reason, stopped.outcome.steps, len(taught)) == ("interrupted", 0, 2)

    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        run(world, tmp_path / "out", "opd", *more, resume=True, watch=stop)
    assert len(taught) == 3
    run(world, tmp_path / "out", "opd", *more, resume=True)
    assert len(taught) == 3
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_checkpoint_of_other_tokens_is_refused(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 2:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        run(world, tmp_path / "out", "sft", watch=stop)
    monkeypatch.setattr("emoloop.tools.diffusion.conditioners.EmotionConditioner.version", 99)
    with pytest.raises(UserError, match="another version of emoloop"):
        run(world, tmp_path / "out", "sft", resume=True)


def test_one_process_that_is_asked_to_stop_stops_all(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anywhere(others: float, asked: list[int]) -> bool:
        accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(accelerator, "reduce", lambda mine: mine + others)
        return trainer.Trainer._anywhere(SimpleNamespace(_accelerator=accelerator), asked)  # type: ignore[arg-type]

    assert anywhere(1.0, []) and anywhere(0.0, [2]) and not anywhere(0.0, [])
    monkeypatch.setattr(trainer.Trainer, "_anywhere", lambda self, asked: True)
    assert run(world, tmp_path / "out", "sft").outcome.reason == "interrupted"


def test_targets_with_one_axis_train_too(world: tuple[Settings, Path], tmp_path: Path) -> None:
    settings = rl_log.settings_for(tmp_path / "home")
    with open_store(settings) as store:
        for number in range(4):
            target = EmotionTarget(arousal=1.0) if number % 2 else EmotionTarget(category="fear")
            store.append(*rl_log.run_events(store, number, model=str(world[1]), revision=None, target=target))
    outcome = run((settings, world[1]), tmp_path / "out", "opd", "data.held_out=0").outcome
    assert np.isfinite(outcome.loss)
    shutil.rmtree(tmp_path / "out")


def test_the_slow_average_starts_where_a_start_on_text_left_the_student(
    world: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def first(self: trainer.Trainer, step: int) -> None:
        student, slow = self.policy.parameters(), self.policy.slow_state()
        assert step == 0 and slow
        assert all(torch.equal(value, student[name]) for name, value in slow.items())
        raise Seen

    monkeypatch.setattr(trainer.Trainer, "_step", first)
    with pytest.raises(Seen):
        run(world, tmp_path / "out", "opd", "objective.teacher=slow", "data.phrases=2", "train.text_steps=3")
