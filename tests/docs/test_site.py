"""The site builds from what is here alone, its links lead somewhere, and every example and notebook runs."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


class Page(HTMLParser):
    """What a page links to, loads and can be linked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {key: value for key, value in attrs if value}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif tag in ("script", "img") and "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built strictly, with every way to the network closed to programs that heed a proxy."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {
        name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    }
    env = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {file: Page(file) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    broken.append(f"{file.relative_to(site)} loads {link}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if parts.path.startswith("/"):
                target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known | {"__top"}):
                broken.append(f"{file.relative_to(site)} → {link}")
    assert not broken, "\n".join(broken)


def test_the_reference_has_every_verb_flag_setting_event_and_name(site):
    import typer
    from emoloop import __all__ as names
    from emoloop import cli
    from emoloop.settings import Settings

    def text(page):
        return (site / "reference" / page / "index.html").read_text(encoding="utf-8")

    def flags(command):
        for inner in getattr(command, "commands", {}).values():
            yield from flags(inner)
        for parameter in command.params:
            yield from (word for word in parameter.opts if word.startswith("--"))

    verbs = text("cli")
    assert not [
        flag for flag in set(flags(typer.main.get_command(cli.app))) - {"--help"} if flag not in verbs
    ]
    from emoloop.traces.exchange.export import FORMATS

    assert not [name for name in FORMATS if f'id="{name}"' not in text("exports")]
    keys = text("settings")
    for section, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        assert not [key for key in inner if f">{section}.{key}<" not in keys]
    api = text("api")
    assert not [name for name in names if f"{name}</" not in api]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_example_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As `python FILE` does it: the file's folder comes first, so that dotted paths find its neighbours.
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebook_runs(file, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "kept without outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
