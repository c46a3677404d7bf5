from pathlib import Path

from emoloop.tools import fingerprint


def test_content_hash_follows_names_and_bytes_and_nothing_else(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "sub" / "b.bin").write_bytes(b"2")
    first = fingerprint.content_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("y")
    assert fingerprint.content_hash(tmp_path) == first
    (tmp_path / "a.json").write_text("2")
    assert fingerprint.content_hash(tmp_path) != first
    (tmp_path / "a.json").rename(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("1")
    assert fingerprint.content_hash(tmp_path) != first


def test_large_files_are_sampled(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "_SAMPLE", 16)
    file = tmp_path / "weights"
    file.write_bytes(bytes(5000))
    first = fingerprint.content_hash(file)
    file.write_bytes(bytes(4999) + b"\1")
    assert fingerprint.content_hash(file) != first
    file.write_bytes(bytes(5001))
    assert fingerprint.content_hash(file) != first


def test_revision_of_a_hub_snapshot_is_its_commit(tmp_path: Path):
    folder = tmp_path / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    assert fingerprint.revision(folder) == "abc123"
    assert len(fingerprint.revision(tmp_path)) == 64


def test_versions_name_what_is_missing():
    assert fingerprint.versions("torch", "no-such-distribution-x")["no-such-distribution-x"] == "none"
