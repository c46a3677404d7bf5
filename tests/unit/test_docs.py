"""What the pages and files beside the code claim, where it can be held against the code without building the site."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import pytest
import yaml
from emoloop.domain import Critique, EmotionTarget
from emoloop.graph.build import build_graph
from emoloop.settings import Settings
from emoloop.tools import presets
from emoloop.tools.reward import Look, load_reward
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONCEPTS = DOCS / "concepts.md"
PAGES = sorted(DOCS.rglob("*.md"))
GRAPH = re.compile(r"(<!-- graph -->\n\n).*?(\n<!-- /graph -->)", re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def graph() -> str:
    """The compiled graph as Mermaid, in a fence."""
    drawn = build_graph(SimpleNamespace(settings=Settings.model_construct())).get_graph().draw_mermaid()
    return f"```mermaid\n{drawn.strip().replace(chr(9), '  ')}\n```\n"


def with_graph(text: str) -> str:
    return GRAPH.sub(lambda found: found[1] + graph() + found[2], text)


def test_the_picture_of_the_graph_is_current():
    text = CONCEPTS.read_text(encoding="utf-8")
    assert with_graph(text) == text, "run: python tests/unit/test_docs.py"


def test_every_example_stands_on_a_page():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [file.name for file in (ROOT / "examples").iterdir() if file.is_file()]
    assert files and not [name for name in files if f"examples/{name}" not in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_included_files_are_there(page):
    for name in re.findall(r'--8<-- "(.+?)"', page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


#: Stand-ins for the packages, with the calls that the page makes: picture and prompt both count.
PACKAGES = {
    "ImageReward": """
class Model:
    def score(self, prompt, picture):
        return picture.getpixel((0, 0))[0] + len(prompt) / 100

def load(name):
    assert name == "ImageReward-v1.0"
    return Model()
""",
    "hpsv3": """
class HPSv3RewardInferencer:
    def __init__(self, device):
        assert device == "cuda"

    def reward(self, pictures, prompts):
        return [(it.getpixel((0, 0))[0] + len(prompt) / 100, 0.5) for it, prompt in zip(pictures, prompts)]
""",
}


@pytest.fixture(params=PACKAGES)
def scores(request, tmp_path, monkeypatch):
    """The page's files in the current folder, its server running there; the address is in SCORES_URL."""
    text = (DOCS / "howto" / "reward.md").read_text(encoding="utf-8")
    for name, about, code in re.findall(r'```python title="(\w+\.py)( [^"]+)?"\n(.*?)```', text, re.DOTALL):
        if not about or request.param.lower() in about.lower():
            (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / f"{request.param}.py").write_text(PACKAGES[request.param], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Popen([sys.executable, "scores.py", "0"], stdout=PIPE, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv("SCORES_URL", server.stdout.readline().removeprefix("scores at ").strip())
        yield
        server.terminate()
    sys.modules.pop("remote", None)


async def test_a_scorer_in_a_process_of_its_own_answers_as_the_page_on_rewards_says(scores):
    reward = load_reward("emotion + 0.2*remote:imagereward")
    critique, target = Critique(valence=0, arousal=0, alignment=1), EmotionTarget(valence=1)
    looks = [Look(critique, target, "a dog", Image.new("RGB", (4, 4), (shade, 0, 0))) for shade in (7, 200)]
    valued = await asyncio.gather(*(reward.values(look) for look in looks))
    told = [{it.name: it.value for it in each} for each in valued]
    assert [it["imagereward"] for it in told] == [7.05, 200.05]
    assert [it["emotion + 0.2*imagereward"] - it["emotion"] for it in told] == pytest.approx([1.41, 40.01])


def test_keys_of_a_models_defaults_are_explained():
    text = (DOCS / "reference" / "emoloop-json.md").read_text(encoding="utf-8")
    told = {
        key
        for line in text.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert told == presets._KNOWN


def test_batch_keys_are_explained():
    from emoloop.rl.objectives import base

    text = (DOCS / "howto" / "objective.md").read_text(encoding="utf-8")
    keys = re.findall(r"^    (\w+)  +(?:\(B|Cond|the same)", base.__doc__ or "", re.MULTILINE)
    assert len(keys) > 9 and not [key for key in keys if f"`{key}`" not in text]


@pytest.mark.parametrize("page", ["reliability", "security"])
def test_promises_name_tests_that_are_there(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (
            f"{file}::{name}"
        )


def test_the_readme_says_for_each_system_where_torch_comes_from_and_promises_no_build():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert not [pin for pin in pins if "+" in pin or pin.startswith(("nvidia-", "triton"))]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "not a build of torch" in text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    said = {
        "Linux without a GPU": "--extra-index-url https://download.pytorch.org/whl/cpu",
        "Linux with an NVIDIA GPU": "leave `-c constraints.txt` away",
        "macOS": "as they stand",
        "Windows": r"`.venv\Scripts\pip`",
        "uv, any of them": "--torch-backend=auto",
    }
    assert all(words in rows[system] for system, words in said.items())


def test_lanes_are_explained():
    lanes = {mark.partition(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert not [lane for lane in lanes if f"pytest -m {lane}`" not in text]


def test_registries_stand_where_contributing_says():
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| [\w ]+ \| `[^`]+` \| `([\w/]+\.py)`, `(\w+)`", line):
            assert re.search(rf"^{match[2]}\b", (ROOT / match[1]).read_text(), re.MULTILINE), match[0]


def test_the_cluster_of_the_docs_is_yaml_and_names_settings_that_exist():
    [manifest] = re.findall(r"```yaml\n(.*?)```", (DOCS / "scaling.md").read_text(), re.DOTALL)
    cluster = yaml.safe_load(manifest)["spec"]["rayClusterSpec"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    for variable in head["env"]:
        section, _, key = variable["name"].removeprefix("EMOLOOP_").lower().partition("__")
        assert key in getattr(Settings.model_fields[section].annotation, "model_fields", {}), variable
    [group] = cluster["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_containers_name_settings_that_exist_and_files_that_are_there():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    environment = compose["services"]["emoloop"]["environment"]
    for name in (name for name in environment if name.startswith("EMOLOOP_")):
        section, _, key = name.removeprefix("EMOLOOP_").lower().partition("__")
        assert key in getattr(Settings.model_fields[section].annotation, "model_fields", {}), name
    assert set(compose["services"]["emoloop"]["depends_on"]) < set(compose["services"])
    dockerfile = (ROOT / "Dockerfile").read_text()
    instructions = {
        line.split()[0] for line in dockerfile.replace("\\\n", " ").splitlines() if line and line[0] != "#"
    }
    assert instructions <= {
        "FROM",
        "ARG",
        "ENV",
        "RUN",
        "COPY",
        "USER",
        "WORKDIR",
        "VOLUME",
        "ENTRYPOINT",
        "CMD",
    }
    ignored = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"}
    packaged = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    assert not ignored & {*packaged, "README.md", "LICENSE", "NOTICE", "constraints.txt", "pyproject.toml"}
    json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())


if __name__ == "__main__":
    CONCEPTS.write_text(with_graph(CONCEPTS.read_text(encoding="utf-8")), encoding="utf-8")
