"""The wheel, installed beside nothing of the checkout: every room imports, and the verbs work from another folder."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MEGABYTES = 40


#: What somebody with a stock pipeline writes, then: the run's pictures, the base again, and that both differ.
STOCK = """
import json, sys
import numpy, torch
from PIL import Image
from emoloop.miniature import codec
from emoloop.tools.presets import resolve

candidates = json.load(open("run.json"))["rounds"][0]["candidates"]

def draw():
    noise = [torch.Generator("cpu").manual_seed(it["seed"]) for it in candidates]
    how = dict(num_inference_steps=14, height=96, width=96, max_sequence_length=0, num_images_per_prompt=len(noise))
    drawn = pipe("a dog by the sea", generator=noise, guidance_scale=emotion.adapter.guidance, **how).images
    return [numpy.asarray(it) for it in drawn]

import diffusers, emoloop
absent = {"text_encoder_3": None, "tokenizer_3": None}
pipe = diffusers.DiffusionPipeline.from_pretrained(resolve("miniature"), dtype=torch.float32, **absent)
emotion = emoloop.apply(pipe, sys.argv[1], emoloop.EmotionTarget(valence=2, arousal=-1))
told = draw()
emotion.remove()
base = draw()
pipe = diffusers.DiffusionPipeline.from_pretrained(resolve("miniature"), dtype=torch.float32, **absent)
print(numpy.array_equal(told, [numpy.asarray(Image.open(it["image"])) for it in candidates]))
print(numpy.array_equal(base, draw()), numpy.array_equal(told, base))
"""


LOOK = ["run", "a cat", "--valence", "1", "--rounds", "1", "--steps", "2"]


def call(*words: str | Path, cwd: Path, env: dict[str, str] | None = None, code: int = 0) -> str:
    """What a program says: on stdout, or on stderr where it ends with a code of its own."""
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist: so the sdist has all that a build needs."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    assert source.stat().st_size < MEGABYTES * 2**20
    return wheel


def install(folder: Path, *words: str | Path, cwd: Path) -> Path:
    """The interpreter of a fresh environment that holds what is named and borrows its dependencies from ours."""
    venv.create(folder)
    python = folder / "bin" / "python"
    [packages] = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth gives its packages, but its own .pth files (editable installs) are not read.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    how = ["-q", "--no-deps", "--no-index", "--no-cache-dir", "--no-build-isolation", "--ignore-installed"]
    call(sys.executable, "-m", "pip", "--python", python, "install", *how, *words, cwd=cwd)
    return python


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    return install(folder / "venv", wheel, cwd=folder)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def shipped(python, elsewhere) -> Path:
    """The adapter that ships."""
    package = Path(call(python, "-c", "import emoloop; print(emoloop.__path__[0])", cwd=elsewhere).strip())
    return package / "miniature" / "adapters" / "opd"


@pytest.fixture
def emoloop(python, elsewhere):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("EMOLOOP_", "PYTHON"))}
    return lambda *words, **how: call(python.parent / "emoloop", *words, cwd=elsewhere, env=env, **how)


def test_it_is_small_and_holds_the_package_alone(wheel):
    assert wheel.stat().st_size <= MEGABYTES * 2**20
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "emoloop",
        f"emoloop-{PROJECT['project']['version']}.dist-info",
    }
    assert not [name for name in names if name.startswith(("emoloop/tests", "emoloop/docs", "emoloop/.venv"))]
    assert "emoloop/py.typed" in names and "emoloop/setup.py" not in names


def test_its_description_has_no_link_that_only_the_repository_knows(wheel):
    [name] = [it for it in zipfile.ZipFile(wheel).namelist() if it.endswith(".dist-info/METADATA")]
    about = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert about["Description-Content-Type"] == "text/markdown"
    text = about.get_payload()
    assert "## Two commands" in text and "![" not in text
    assert not [it for it in re.findall(r"\]\(([^)]*)\)", text) if not it.startswith(("https://", "#"))]


def test_every_module_imports(python, elsewhere, wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    modules = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names)
    modules = [m for m in modules if not m.endswith("__main__")]  # it runs on import
    code = f"import importlib, emoloop\nfor name in {modules!r}: importlib.import_module(name)\nprint(emoloop.__file__)"
    where = call(python, "-c", code, cwd=elsewhere).strip()
    assert Path(where).is_relative_to(python.parents[1])


def test_pyright_sees_the_types_of_an_editable_install_made_as_the_readme_says(wheel, tmp_path):
    [source] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    [checkout] = tmp_path.iterdir()
    [words] = re.findall(r"`pip install (--config-settings .+)`", (ROOT / "README.md").read_text())
    python = install(tmp_path / "venv", *words.split(), cwd=checkout)
    (tmp_path / "theirs.py").write_text(
        "from emoloop import EmotionTarget\nreveal_type(EmotionTarget().valence)\n"
    )
    found = call(sys.executable, "-m", "pyright", "--pythonpath", python, "theirs.py", cwd=tmp_path)
    assert 'Type of "EmotionTarget().valence" is "float | None"' in found
    assert (
        call(python, "-m", "emoloop", "--version", cwd=tmp_path)
        == f"emoloop {PROJECT['project']['version']}\n"
    )


def test_it_tells_its_version(emoloop):
    assert PROJECT["project"]["version"] in emoloop("--version")


def test_the_verbs_work(emoloop, elsewhere):
    small = ["--rounds", "1", "--images", "2", "--steps", "2", "--json"]
    run = json.loads(emoloop("run", "a dog by the sea", "--valence", "2", "--arousal", "-1", *small))
    assert run["status"] == "completed" and len(run["rounds"][0]["candidates"]) == 2
    (elsewhere / "prompts.jsonl").write_text(
        '{"prompt": "a cat", "valence": 1}\n{"prompt": "a fox", "valence": -1, "arousal": 1}\n'
    )
    assert json.loads(emoloop("collect", "prompts.jsonl", *small))["completed"] == 2
    assert json.loads(emoloop("distill", "rwr", "--dry-run", "--json"))
    steps = ["--set", "train.steps=2", "--json"]
    emoloop("distill", "rwr", "--out", "adapter", *steps)
    assert (elsewhere / "adapter" / "training.json").is_file()
    report = json.loads(emoloop("eval", "loop", "--arms", "base", "--limit", "1", "--json"))
    assert report
    assert json.loads(emoloop("bench", "dataset", "runs=20", "phrases=0", "--json"))["figures"]["runs"] == 20


def test_a_look_at_what_was_distilled_is_no_end_of_distilling(emoloop, shipped):
    home, look = ["--home", "looked"], [*LOOK, "--images", "2"]
    emoloop(*look, *home)
    emoloop(*look, *home, "--adapter", shipped)
    said = emoloop("distill", "rwr", "--dry-run", *home, code=2)
    [cure] = re.findall(
        r"2 base models .*: pick one with --from (adapter=\w+) or --from adapter=none$", said, re.M
    )
    assert cure.removeprefix("adapter=")[:12] in emoloop("traces", "list", *home)
    assert json.loads(emoloop("distill", "rwr", "--dry-run", "--json", "--from", "adapter=none", *home))


def test_a_dotted_path_sees_the_current_folder(emoloop, elsewhere):
    (elsewhere / "of_ones_own.py").write_text("def half(critique, target):\n    return 0.5\n")
    run = json.loads(emoloop(*LOOK, "--images", "1", "--json", "--set", "loop.reward=of_ones_own:half"))
    assert [it["reward"] for it in run["rounds"][0]["candidates"]] == [0.5]


def test_five_lines_draw_in_a_stock_pipeline_what_a_run_draws(emoloop, python, elsewhere, shipped):
    words = [
        "--valence",
        "2",
        "--arousal",
        "-1",
        "--rounds",
        "1",
        "--proposals",
        "1",
        "--images",
        "8",
        "--json",
    ]
    run = emoloop("run", "a dog by the sea", *words, "--adapter", shipped, "--home", "adapted")
    (elsewhere / "run.json").write_text(run)
    assert call(python, "-c", STOCK, shipped, cwd=elsewhere).split() == ["True", "True", "False"]
