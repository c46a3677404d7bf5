import json
import sys
from pathlib import Path

import pytest
from emoloop.domain import UserError
from emoloop.tools import presets
from emoloop.tools.registry import resolve


def test_registry_gives_objects_and_follows_dotted_paths():
    registry = {"here": 42, "far": "json:dumps", "own": ".domain:UserError"}
    assert resolve("here", registry) == 42
    assert resolve("far", registry) is json.dumps
    assert resolve("own", registry) is UserError
    assert resolve("pathlib:Path.home", registry) == Path.home
    assert resolve(len, registry) is len


def test_a_dotted_path_sees_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.path", [it for it in sys.path if it not in ("", str(Path.cwd()))])
    (tmp_path / "of_ones_own.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("of_ones_own:answer", {}) == 42


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("heer", "did you mean 'here'"),
        ("nothing_like_it", "known are here"),
        ("no_such_module_x:Y", "cannot import 'no_such_module_x'"),
        ("json:nothing", "'json' has no 'nothing'"),
    ],
)
def test_registry_explains_what_it_cannot_find(spec: str, words: str):
    with pytest.raises(UserError, match=words):
        resolve(spec, {"here": 1}, "reward")


def test_presets_give_folders_and_hub_ids(tmp_path: Path):
    assert presets.resolve("sd35-medium") == "stabilityai/stable-diffusion-3.5-medium"
    assert presets.resolve("qwen25-vl-7b", "lvlm") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert presets.resolve("somebody/model") == "somebody/model"
    assert presets.resolve(tmp_path) == tmp_path
    assert presets.defaults("sd35-medium")["steps"] == 40


@pytest.mark.parametrize(
    "name", ["miniatur", "/not/there", "./not/there", "not/there/either", Path("gone/away")]
)
def test_presets_refuse_what_is_neither(name: str | Path):
    with pytest.raises(UserError, match="presets are miniature"):
        presets.resolve(name)


def test_a_folder_brings_its_defaults(tmp_path: Path):
    assert presets.defaults(tmp_path) == {}
    (tmp_path / "emoloop.json").write_text('{"steps": 3}')
    assert presets.defaults(tmp_path) == {"steps": 3}
    (tmp_path / "emoloop.json").write_text("[3]")
    with pytest.raises(UserError, match=r"emoloop\.json: a JSON object"):
        presets.defaults(tmp_path)
    (tmp_path / "emoloop.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        presets.defaults(tmp_path)


def test_a_misspelt_default_of_a_model_is_refused(tmp_path: Path):
    (tmp_path / "emoloop.json").write_text('{"setps": 3}')
    with pytest.raises(UserError, match="unknown key setps"):
        presets.defaults(tmp_path)
