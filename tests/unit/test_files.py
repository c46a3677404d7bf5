"""Files appear whole or not at all, and what cannot be written is said before anything is."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize("unnamed", [True, False])
def test_files_with_and_without_a_name_are_written_alike(tmp_path: Path, monkeypatch, unnamed):
    if not unnamed:
        monkeypatch.delattr("os.O_TMPFILE", raising=False)
    for text in ("old", "new"):
        assert write_atomic(tmp_path / "a.json", text).read_text() == text
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_killed_writer_leaves_no_file(tmp_path: Path):
    code = "import os, sys; from emoloop.files import *; os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
    code += "write_atomic(Path(sys.argv[1], 'a.json'), 'new')"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert os.listdir(tmp_path) == []


def _umask() -> int:
    os.umask(found := os.umask(0o022))
    return found


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch):
    check_writable(tmp_path / "not" / "there", "--out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to home .*/file/x: .*/file is a file \(set another\)"):
        check_writable(tmp_path / "file" / "x", "home", "set another")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="no permission in"):
        check_writable(tmp_path / "x", "--out")
