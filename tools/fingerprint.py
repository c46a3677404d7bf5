"""What exactly made a picture: content hashes of model folders and the versions of libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Files up to this size are hashed whole, larger ones by samples.
_WHOLE = 64 * 2**20
_SAMPLES, _SAMPLE = 32, 2**20


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= _WHOLE:
        return bytes.fromhex(file_digest(path))
    # Weights that differ at all differ everywhere, so evenly spread samples tell 20 GB models apart at once.
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.digest()


def content_hash(paths: Path | Iterable[Path]) -> str:
    """SHA-256 (hex) over names and contents of a file, several files, or a model folder.

    In a folder, hidden files and `*.md` don't count: they don't change what the model does.
    """
    if isinstance(paths, Path):
        root = paths if paths.is_dir() else paths.parent
        files = [p for p in paths.rglob("*") if p.is_file()] if paths.is_dir() else [paths]
        named = {p.relative_to(root).as_posix(): p for p in files}
        kept = {
            name: p
            for name, p in named.items()
            if not any(part.startswith((".", "__")) for part in name.split("/")) and p.suffix != ".md"
        }
    else:
        kept = {p.name: p for p in paths}
    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(name.encode() + b"\0" + _digest(kept[name]))
    return digest.hexdigest()


def revision(folder: Path) -> str:
    """The commit of a hub snapshot (`…/snapshots/<commit>`), else the folder's content hash."""
    folder = folder.absolute()
    return folder.name if folder.parent.name == "snapshots" else content_hash(folder)


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions by name; "none" for one that is missing."""
    return {name: _version(name) for name in names}
