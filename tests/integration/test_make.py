"""`emoloop make`: the same pixels again, from a file or the log; and what a stranger's file cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest
import tiny
from emoloop import cli
from emoloop.domain import EmotionTarget
from emoloop.events import Critiqued, ImageGenerated, Rewarded, RunFinished, RunStarted
from emoloop.settings import GeneratorSettings, Settings
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.load import load_generator
from emoloop.traces.recipe import dressed, find, read, write
from emoloop.traces.store import open_store
from PIL import Image

PROMPT, SEED = "a dog by the sea", 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A log with a run of one picture by a tiny pipeline, and the file that it left."""
    folder = tmp_path_factory.mktemp("make")
    model = tiny.save("sd3", folder / "model")
    settings = GeneratorSettings(model=str(model), steps=3, micro_batch=2)

    async def paint():
        source = load_generator(settings)
        made = await source.generate([ImageRequest(PROMPT, SEED)])
        await source.aclose()
        return made[0]

    made = asyncio.run(paint())
    with open_store(Settings(home=folder / "home")) as store:
        sha256 = store.blobs.put_image(made.image)
        for run_id, more in (("one", {}), ("object", {"objects": ["generator"]})):
            about = {"run_id": run_id, "sha256": sha256}
            store.append(
                RunStarted(
                    run_id=run_id, prompt=PROMPT, target=EmotionTarget(valence=1.0), seed=1,
                    settings={"generator": settings.model_dump(mode="json"), **more},
                ),
                ImageGenerated(**about, prompt=PROMPT, seed=SEED, **made.provenance),
                Rewarded(**about, name="r", version="1", value=0.5),
                RunFinished(run_id=run_id, status="completed", stop_reason="rounds_used"),
            )  # fmt: skip
        (folder / "it.png").write_bytes(dressed(store, sha256, "recipe"))
    return folder


@pytest.fixture
def shell(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("EMOLOOP_")]:
        monkeypatch.delenv(name)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["emoloop", "make", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def changed(home, path, **changes):
    picture, carried = read(home / "it.png")
    picture.save(path)
    path.write_bytes(write(path.read_bytes(), carried.model_copy(update={"sha256": "0" * 64, **changes})))
    return path


def test_a_file_alone_gives_the_same_pixels(home, shell, tmp_path):
    code, out, err = shell(home / "it.png", "--model", home / "model", "--out", "again.png", "--json")
    document = json.loads(out)
    assert code == 0 and document["same"] and document["difference"] == 0 and "the same pixels" in err
    assert document["recipe"]["prompt"] == PROMPT and document["recipe"]["steps"] == 3
    picture, carried = read(tmp_path / "again.png")
    first, recipe = read(home / "it.png")
    assert (picture.tobytes(), carried) == (first.tobytes(), recipe)


def test_the_log_knows_it_by_file_address_and_run(home, shell):
    with open_store(Settings(home=home / "home"), read_only=True) as store:
        sha256 = store.run("one").best.sha256
        bare = store.blobs.path(sha256)
    for what in (home / "it.png", bare, sha256, "one"):
        assert shell(what, "--home", home / "home")[0] == 0, what


def test_other_pixels_are_told_and_fail(home, shell, tmp_path):
    file = changed(home, tmp_path / "other.png", seed=SEED + 1)
    code, _, err = shell(file, "--model", home / "model")
    assert code == 1 and "other pixels: up to" in err
    file = changed(home, tmp_path / "larger.png", width=64, versions={"torch": "0", "micro_batch": "2"})
    code, _, err = shell(file, "--model", home / "model")
    assert code == 1 and "another picture, of 64 × 32 pixels" in err and "torch 0 then" in err


def test_a_setting_leaves_the_recipe_out(home, shell, tmp_path):
    words = ("--home", home / "home", "--set", "traces.metadata=mark", "--out", "marked.png")
    assert shell("one", *words)[0] == 0
    assert read(tmp_path / "marked.png")[1] is None
    assert b"trainedAlgorithmicMedia" in (tmp_path / "marked.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bare.png"], "carries no recipe"),
        (["nothing"], "no file 'nothing'"),
        (["0" * 64], "no file '0000"),
        (["it.png"], "if you trust it, name it by --model"),
        (["dotted.png"], "if you trust it, name it by --model"),
        (["adapted.png"], "made with adapter 'abc': name its folder by --adapter"),
        (["odd.png", "--model", "miniature"], "dtype"),
        (["it.png", "--model", "no-model"], "no generator 'no-model'"),
        (["bare.png", "--out", "."], "is a folder"),
        (["object", "--home", "HOME"], "was an object of a Python program"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_loads_nothing(home, shell, tmp_path, words, said):
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    changed(home, tmp_path / "it.png")
    changed(home, tmp_path / "dotted.png", model="evil:Generator")
    changed(home, tmp_path / "adapted.png", model="miniature", adapter="abc")
    changed(home, tmp_path / "odd.png", model="miniature", versions={"dtype": "\x1b[31m"})
    (tmp_path / "evil.py").write_text("raise SystemExit(42)")
    code, out, err = shell(*(str(home / "home") if word == "HOME" else word for word in words))
    *before, last = err.splitlines()
    assert (code, out) == (2, "") and said in last and "\x1b" not in err
    assert [line for line in before if not line.endswith("loading the model …")] == []


def test_the_recipe_of_a_run_is_that_of_its_own_picture(home):
    with open_store(Settings(home=home / "home"), read_only=True) as store:
        found = find(store, store.run("one").best.sha256, "object")
        assert found is not None and found[0].run == "object"
        assert not [event for event in store.events("one") if isinstance(event, Critiqued)]
