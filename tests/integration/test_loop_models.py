"""The loop with real models, tiny and random: a diffusers pipeline and an embedded LVLM from their folders."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_lvlm
import torch
from emoloop import cli
from emoloop.domain import EmotionTarget, RunStatus
from emoloop.graph.loop import Loop, open_loop
from safetensors.torch import save_file

TARGET = EmotionTarget(valence=2, arousal=-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save("sd3", folder / "generator", tokenizer=tiny.word_tokenizer())
    tiny_lvlm.build(folder / "lvlm")
    return folder


def make(models: Path, home: Path) -> Loop:
    return open_loop(
        generator={"model": str(models / "generator"), "steps": 2, "micro_batch": 2},
        lvlm={"model": str(models / "lvlm"), "max_tokens": 16},
        home=str(home),
        loop={"rounds": 2, "images": 2},
    )


def pictures(result) -> list:
    return [(c.sha256, c.critique, c.reward) for round in result.rounds for c in round.candidates]


async def test_sixteen_runs_share_the_models_and_are_each_as_alone(models, tmp_path):
    asked = [f"a {what} {where}" for what in ("dog", "cat", "red house", "boat")
             for where in ("by the sea", "on a hill", "in the city", "at night")]  # fmt: skip
    async with make(models, tmp_path) as loop:
        together = await asyncio.gather(*(loop.run(p, TARGET, seed=i) for i, p in enumerate(asked)))
        alone = [await loop.run(p, TARGET, seed=i) for i, p in enumerate(asked)]
    assert all(result.status is RunStatus.COMPLETED for result in together)
    assert len({result.rounds[0].candidates[0].sha256 for result in together}) == len(asked)
    for one, other in zip(alone, together, strict=True):
        assert [r.prompt for r in one.rounds] == [r.prompt for r in other.rounds]
        assert pictures(one) == pictures(other)
        assert one.best.sha256 == other.best.sha256


def test_from_the_shell_with_an_adapter_of_another_model(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    words = [
        "run",
        "a dog",
        "--valence",
        "1",
        "--model",
        str(models / "generator"),
        "--lvlm",
        str(models / "lvlm"),
    ]
    monkeypatch.setattr(sys, "argv", ["emoloop", *words, "--adapter", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert len([line for line in err.splitlines() if line.startswith("emoloop: ")]) == 1
    assert not (tmp_path / ".emoloop").exists()

    monkeypatch.setattr(sys, "argv", ["emoloop", *words, "--rounds=1", "--images=1", "--steps=1", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["status"] == "completed"
