"""A picture carries its recipe: where it leaves the log, and whatever a file claims to be."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from emoloop.domain import EmotionTarget, UserError
from emoloop.events import ImageGenerated, RunStarted
from emoloop.settings import Settings
from emoloop.traces import recipe as recipes
from emoloop.traces.recipe import CHUNK, Recipe, dressed, find, read, write
from emoloop.traces.store import open_store
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MADE = {
    "prompt": "ein Hund – 犬",
    "seed": 2**63,
    "model": "m",
    "height": 16,
    "width": 24,
    "steps": 4,
    "guidance": 2.5,
}


@pytest.fixture
def store(tmp_path):
    with open_store(Settings(home=tmp_path / "home")) as store:
        yield store


def add(store, run_id, **changes):
    sha256 = store.blobs.put_image(Image.linear_gradient("L").resize((24, 16)))
    target = EmotionTarget(valence=1.0)
    settings = {"generator": {"adapter": "/home/me/secret", "adapter_scale": 0.5, "api_key": "k"}}
    made = {"negative_prompt": "dark", "adapter": "abc@0.5", "versions": {"torch": "2"}, **MADE, **changes}
    store.append(
        RunStarted(run_id=run_id, prompt="p", target=target, seed=1, settings=settings),
        ImageGenerated(run_id=run_id, round=2, index=3, sha256=sha256, **made),
    )
    return sha256


def test_a_picture_that_leaves_carries_its_recipe_and_the_mark(store, tmp_path):
    sha256 = add(store, "one")
    assert add(store, "two") == sha256  # equal pictures of two runs stay one file
    bare = store.blobs.get_bytes(sha256)
    for run_id in ("one", "two"):
        file = tmp_path / f"{run_id}.png"
        file.write_bytes(dressed(store, sha256, "recipe", run_id))
        picture, carried = read(file)
        assert carried is not None and (carried.run, carried.round, carried.candidate) == (run_id, 2, 3)
        assert carried.sha256 == sha256 and carried.target == EmotionTarget(valence=1.0)
        assert MADE.items() <= carried.model_dump().items()
        assert (carried.negative_prompt, carried.adapter, carried.versions) == (
            "dark",
            "abc@0.5",
            {"torch": "2"},
        )
        assert carried.settings == {"adapter_scale": 0.5}
        assert picture.tobytes() == store.blobs.get_image(sha256).tobytes()
        assert SOURCE.encode() in file.read_bytes() and b"secret" not in file.read_bytes()
    assert store.blobs.get_bytes(sha256) == bare
    known = find(store, sha256)
    assert known is not None and known[0].run == "one"


def test_a_setting_leaves_out_the_recipe_or_all(store, tmp_path):
    sha256 = add(store, "one")
    assert dressed(store, sha256, "none") == store.blobs.get_bytes(sha256)
    marked = dressed(store, sha256, "mark")
    assert SOURCE.encode() in marked and "犬".encode() not in marked and b'"run"' not in marked


def test_what_was_brought_from_elsewhere_is_left_as_it_is(store):
    for changes in ({"run_id": "import-1"}, {"run_id": "x", "seed": None}):
        sha256 = add(store, changes.pop("run_id"), **changes)
        assert find(store, sha256, "x") is None
    assert dressed(store, sha256, "recipe", "import-1") == store.blobs.get_bytes(sha256)


def test_a_generator_of_anybodys_may_say_what_no_setting_would(store, tmp_path):
    file = tmp_path / "it.png"
    file.write_bytes(dressed(store, add(store, "one", steps=0, width=4, seed=-1, guidance=None), "recipe"))
    with pytest.raises(UserError, match="recipe that cannot be used"):
        read(file)


def png(text=None, size=(8, 8), compressed=False, key=CHUNK):
    info, file = PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text(key, text, zip=compressed)
    Image.new("RGB", size).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def bomb():
    """A header that claims a picture of a million by a million."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + png()[33:]
    )


def saved(kind):
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png("x" * 200_000), "200000 characters"),
        (png("x" * 5_000_000, compressed=True), "no PNG picture that can be used"),
        (png("x" * 5_000_000, compressed=True, key="other"), "no PNG picture that can be used"),
        (png('{"a":' * 9_000), "cannot be used"),
        (png("[1]"), "cannot be used"),
        (png('{"run": "r"}'), "cannot be used"),
        (png("no json"), "cannot be used"),
        (bomb(), "no PNG picture that can be used"),
        (png(size=(8000, 7000)), "too many"),
        (saved("PNG")[:200], "no PNG picture that can be used"),
        (saved("JPEG"), "no PNG picture that can be used"),
        (b"", "no PNG picture that can be used"),
    ],
    ids=lambda it: it if isinstance(it, str) else "png",
)
def test_a_hostile_or_damaged_file_is_one_line(tmp_path, data, said):
    file = tmp_path / "it.png"
    file.write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        read(file)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_picture_without_a_recipe_has_none(tmp_path):
    file = tmp_path / "it.png"
    file.write_bytes(png())
    assert read(file)[1] is None


@pytest.mark.parametrize(
    "wrong", [{"steps": 10**9}, {"width": 10**9}, {"seed": -1}, {"sha256": "../x"}, {"run": "r" * 999}]
)
def test_numbers_out_of_all_reason_are_refused(tmp_path, wrong):
    fair = {"run": "r", "round": 0, "candidate": 0, "sha256": "0" * 64, **MADE}
    file = tmp_path / "it.png"
    file.write_bytes(write(png(), Recipe.model_construct(**fair | wrong)))
    with pytest.raises(UserError, match=next(iter(wrong))):
        read(file)


def test_every_field_of_an_event_that_makes_a_picture_again_is_carried():
    about = set(ImageGenerated.model_fields) - {
        "run_id", "seq", "cursor", "time", "node", "index", "schema_version", "type", "latents", "seconds",
    }  # fmt: skip
    assert about <= set(Recipe.model_fields)
    assert set(recipes._SETTINGS) <= set(type(Settings().generator).model_fields)
