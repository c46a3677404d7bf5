"""Files appear whole or not at all, and what cannot be written is said before anything is."""

import os
from pathlib import Path

import pytest
from emoloop.domain import UserError
from emoloop.files import check_writable, replacing, write_atomic


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "sub" / "a.json"
    assert write_atomic(path, "é").read_bytes() == "é".encode()
    write_atomic(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = write_atomic(tmp_path / "a.json", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        assert beside.suffix == ".json"
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch):
    check_writable(tmp_path / "not" / "there", "--out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to home .*/file/x: .*/file is a file \(set another\)"):
        check_writable(tmp_path / "file" / "x", "home", "set another")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="no permission in"):
        check_writable(tmp_path / "x", "--out")
