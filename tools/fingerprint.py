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


def _digest(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").digest()
        # Weights that differ at all differ everywhere, so evenly spread samples tell 20 GB models apart at once.
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.digest()


def content_hash(paths: Path | Iterable[Path]) -> str:
    """SHA-256 (hex) over names and contents of a file, several files, or a model folder.

    Hidden files and `*.md` don't count: they don't change what the model does.
    """
    named: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        root, files = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
        named |= {file.relative_to(root).as_posix(): file for file in files if file.is_file()}
    digest = hashlib.sha256()
    for name, file in sorted(named.items()):
        if file.suffix != ".md" and not any(part.startswith((".", "__")) for part in name.split("/")):
            digest.update(name.encode() + b"\0" + _digest(file))
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
