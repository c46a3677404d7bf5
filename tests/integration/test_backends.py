"""Ways to run the network: the same pictures within a tolerance, a recipe that says so, and a remembered choice."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rl_log
import tiny
from emoloop.domain import UserError
from emoloop.evals.bench import generator as bench
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.settings import GeneratorSettings
from emoloop.tools.images import backends
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.load import load_generator
from emoloop.tools.presets import read_json

#: What another batch size may change too, of 255.
TOLERANCE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("model"))


def pictures(spec: Any, **settings: Any) -> tuple[np.ndarray, dict[str, Any]]:
    generator: Any = load_generator(spec, GeneratorSettings(device="cpu", **settings))

    async def draw() -> list[Any]:
        made = await generator.generate([ImageRequest(prompt, 3) for prompt in ("a dog", "the sea")])
        await generator.aclose()
        return made

    made = asyncio.run(draw())
    return np.stack([np.asarray(it.image, np.int16) for it in made]), made[0].provenance["versions"]


def test_a_fused_adapter_gives_the_same_pictures_and_is_taken_out_again(folder: Path, tmp_path: Path) -> None:
    settings = rl_log.write_log(tmp_path / "home", 6, model=str(folder), revision=None)
    quick = ("train.steps=2", "train.batch_size=2", "train.tensorboard=false", "train.device=cpu", "train.lr=0.01",
             "guard.every=0", "policy.rank=4")  # fmt: skip
    distill(settings, load_config("sft", sets=quick), tmp_path / "adapter")
    pipe = tiny.build("sd3")
    plain, _ = pictures(pipe)
    apart, versions = pictures(pipe, adapter=str(tmp_path / "adapter"))
    fused, versions_fused = pictures(pipe, adapter=str(tmp_path / "adapter"), fuse_lora=True)
    assert np.abs(apart - plain).max() > TOLERANCE >= np.abs(fused - apart).max()
    assert "backend" not in versions and versions_fused["backend"] == "eager+fused"
    assert np.abs(pictures(pipe)[0] - plain).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(
    not find_spec("onnxruntime") or not find_spec("onnxscript"), reason="needs the extra onnx"
)
@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
def test_onnxruntime_gives_the_same_pictures(name: str) -> None:
    pipe = tiny.build(name)
    eager, _ = pictures(pipe)
    other, versions = pictures(pipe, backend="onnxruntime")
    assert np.abs(other - eager).max() <= TOLERANCE and versions["backend"] == "onnxruntime"
    assert np.array_equal(pictures(pipe)[0], eager)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_pictures(folder: Path) -> None:
    eager, _ = pictures(str(folder))
    other, versions = pictures(str(folder), backend="compile")
    assert np.abs(other - eager).max() <= TOLERANCE and versions["backend"] == "compile"


def test_what_is_not_there_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"generator\.attention warp: .*must be one of"):
        pictures(str(folder), attention="warp")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed \(pip install 'emoloop\[onnx\]'\)"):
        pictures(str(folder), backend="onnxruntime")


def test_a_choice_is_remembered_for_one_model_on_one_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native = backends.Way("eager", "native")
    monkeypatch.setattr(bench, "_ways", lambda adapted: [backends.Way(), native])
    document = bench.main(model=str(folder), batches=1, repeats=1, tune=True)
    assert document["figures"]["eager+native_max_difference"] == 0
    # Which was faster is the machine's affair: what counts is that it is taken.
    [mark] = read_json(tmp_path / "emoloop" / "generators.json")
    backends.remember(mark, native)
    assert pictures(str(folder), backend="tuned")[1]["backend"] == "eager+native"
    assert "backend" not in pictures(str(folder))[1]
    assert "backend" not in pictures(str(folder), backend="tuned", height=64)[1]
