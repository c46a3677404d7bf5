"""A bundle: every address in it is a file beside it, strange names and texts included."""

from __future__ import annotations

import io
import re
from urllib.parse import unquote
from zipfile import ZipFile

from emoloop.domain import EmotionTarget
from emoloop.events import ImageGenerated, Rewarded, RunStarted
from emoloop.service.bundle import write_bundle, zipped
from emoloop.settings import Settings
from emoloop.traces.store import open_store
from PIL import Image


def test_every_address_is_a_file_of_the_bundle(tmp_path):
    names, out = ("a:1", "b+2"), tmp_path / "bundle"
    with open_store(Settings(home=tmp_path / "home")) as store:
        for number, name in enumerate(names):
            sha256 = store.blobs.put_image(Image.new("RGB", (16, 16), ("red", "blue")[number]))
            store.append(
                RunStarted(run_id=name, prompt="<b>a dog</b>", target=EmotionTarget(valence=1.0), seed=1),
                ImageGenerated(
                    run_id=name, sha256=sha256, prompt="p", seed=1, model="m", height=16, width=16
                ),
                Rewarded(run_id=name, sha256=sha256, name="r", version="1", value=0.5),
                ImageGenerated(
                    run_id=name, index=1, sha256="0" * 64, prompt="p", seed=2, model="m", height=8, width=8
                ),
            )
        assert write_bundle(store, names, out) == 2
        with ZipFile(io.BytesIO(zipped(store, names[:1], "recipe"))) as packed:
            assert {"a_1/index.html", "a_1/a_1.html", "a_1/static/app.css"} <= set(packed.namelist())
    pages = sorted(out.glob("*.html"))
    assert len(pages) == 2 + 2 * 3
    lost = "images/" + "0" * 64
    for page in pages:
        text = page.read_text()
        assert "<b>a dog</b>" not in text and "<form" not in text and "hx-" not in text
        found = {unquote(it) for it in re.findall(r'(?:href|src)="([^"]+)"', text)} - {"#main", "data:,"}
        assert not [it for it in found if not it.startswith(lost) and not (out / it).is_file()], page.name
