"""Blobs: same pixels, same bytes, same name; whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest
from emoloop.traces.blobs import BlobStore
from PIL import Image


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def files(blobs):
    return [path for path in blobs.folder.rglob("*") if path.is_file()]


def test_the_address_is_the_hash_of_the_file(blobs):
    sha256 = blobs.put_bytes(b"hello", "bin")
    path = blobs.path(sha256, "bin")
    assert path.relative_to(blobs.folder).parts == (sha256[:2], f"{sha256}.bin")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert blobs.get_bytes(sha256, "bin") == b"hello"


def test_equal_pixels_give_equal_bytes(blobs):
    plain = Image.linear_gradient("L").convert("RGB")
    dressed = plain.copy()
    dressed.info = {"icc_profile": b"profile", "dpi": (300, 300), "comment": "mine"}
    opaque = plain.convert("RGBA")
    assert blobs.put_image(plain) == blobs.put_image(dressed) == blobs.put_image(opaque)
    assert len(files(blobs)) == 1
    assert blobs.get_image(blobs.put_image(plain)).tobytes() == plain.tobytes()
    assert dressed.info["dpi"] == (300, 300)


def test_a_full_disk_leaves_nothing_behind(blobs, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    blobs.put_bytes(b"before", "bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            blobs.put_bytes(b"after", "bin")
    assert len(files(blobs)) == 1
    assert blobs.get_bytes(blobs.put_bytes(b"after", "bin"), "bin") == b"after"


def test_damage_is_noticed(blobs):
    sha256 = blobs.put_bytes(b"hello", "bin")
    blobs.path(sha256, "bin").write_bytes(b"jello")
    with pytest.raises(OSError, match="damaged"):
        blobs.get_bytes(sha256, "bin")
    with pytest.raises(FileNotFoundError):
        blobs.get_bytes("0" * 64)
