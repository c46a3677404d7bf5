"""Runs as a folder of pages that opens from disk: nothing is loaded from elsewhere, and no server is needed.

The pages are the server's own, from the same templates, without what only a server can do.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..domain import UserError
from ..files import check_writable
from ..traces.exchange.export import export_jsonl
from ..traces.recipe import Metadata
from ..traces.rows import RunFilter
from ..traces.store import TraceStore
from .documents import Listing, RunDocument, RunPage, Shot
from .errors import NotFound
from .images import picture, thumbnail
from .reading import document
from .templates import STATIC, Links, Side, differences, render


class _Files(Links):
    """Where the pages of a bundle lie, all in one folder."""

    live = False
    home = "index.html"

    def run(self, run_id: str) -> str:
        return f"{_plain(run_id)}.html"

    def shot(self, run_id: str, shot: Shot) -> str:
        return f"{_plain(run_id)}.{shot.round}.{shot.index}.html"

    def events(self, run_id: str) -> str:
        return f"{_plain(run_id)}.jsonl"

    def compare(self, *run_ids: str) -> str:
        return "compare.html"

    def image(self, sha256: str) -> str:
        return f"images/{sha256}.png"

    def thumbnail(self, sha256: str, side: int = 192) -> str:
        return f"images/{sha256}-{side}.webp"

    def static(self, name: str) -> str:
        return f"static/{name}"


def _plain(run_id: str) -> str:
    """A run id as a file's name on any system, which is no address of another kind either."""
    return re.sub(r"[^\w.@+-]", "_", run_id)


def write_bundle(store: TraceStore, run_ids: Sequence[str], out: Path, metadata: Metadata = "recipe") -> int:
    """Write runs as a folder of pages; `index.html` is the first.

    Args:
        store: The log.
        run_ids: The runs, by their full ids.
        out: The folder; new, or empty.
        metadata: What the pictures carry.

    Returns:
        How many runs it holds.

    Raises:
        UserError: The folder is not empty, or cannot be written.
    """
    check_writable(out, "--out", "choose another with --out")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose a new folder")
    links = _Files()
    (out / "images").mkdir(parents=True)
    (out / "static").mkdir()
    for name in ("app.css", "app.js"):
        shutil.copyfile(STATIC / name, out / "static" / name)

    def write(name: str, template: str, **about: object) -> None:
        (out / name).write_text(render(template, links=links, **about), encoding="utf-8")

    runs = [document(store.events(run_id)) for run_id in run_ids]
    for run in runs:
        run_id, shots = run.run.run_id, run.shots
        write(links.run(run_id), "run.html.jinja", run=run)
        with (out / links.events(run_id)).open("w", encoding="utf-8") as stream:
            export_jsonl(store, RunFilter(run_ids=(run_id,)), stream)
        for place, shot in enumerate(shots):
            write(links.shot(run_id, shot), "shot.html.jinja", run=run, shot=shot, **run.beside(place))
        _pictures(store, run, links, out, metadata)
    page = RunPage(items=[run.run for run in runs], next=None, total=len(runs))
    write(links.home, "runs.html.jinja", page=page, wanted=Listing(), view="", pair=len(runs) == 2)
    if len(runs) == 2:
        sides = [Side(run) for run in runs]
        write(links.compare(), "compare.html.jinja", sides=sides, differences=differences(*sides))
    return len(runs)


def zipped(store: TraceStore, run_ids: Sequence[str], metadata: Metadata) -> bytes:
    """A bundle as a ZIP file, with a folder named after its first run in it."""
    with tempfile.TemporaryDirectory(prefix="emoloop-bundle-") as folder:
        name = _plain(run_ids[0])
        write_bundle(store, run_ids, Path(folder) / "in" / name, metadata)
        return Path(shutil.make_archive(f"{folder}/out", "zip", f"{folder}/in", name)).read_bytes()


def _pictures(store: TraceStore, run: RunDocument, links: Links, out: Path, metadata: Metadata) -> None:
    for sha256 in {shot.sha256 for shot in run.shots if shot.sha256}:
        try:
            (out / links.image(sha256)).write_bytes(picture(store, sha256, metadata))
            for side in (96, 192):
                (out / links.thumbnail(sha256, side)).write_bytes(thumbnail(store.blobs, sha256, side))
        except NotFound:
            # A lost picture leaves its place empty, as on the server.
            continue
