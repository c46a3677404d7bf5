"""A content-addressed cache of small JSON documents: what was made or read once is not made or read again.

One file for each key, written beside and renamed, so that several processes (one for each GPU) can fill one cache
and a kill leaves no half document.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """JSON documents under a folder.

    Args:
        root: The folder; made when something is first put.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"

    def get(self, key: str) -> Any | None:
        """The document, or None; one that cannot be read counts as absent and is made again."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def put(self, key: str, document: Any) -> None:
        """Store a document."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{uuid4().hex}")
        beside.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        os.replace(beside, path)


_known: dict[tuple[str, int, int], str] = {}


def fingerprint(path: Path) -> str:
    """SHA-256 over names and contents of a file, or of all files under a folder.

    Weights are read once in a process: a file is known by path, size and time of change afterwards.
    """
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        status = file.stat()
        key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
        if key not in _known:
            with file.open("rb") as stream:
                _known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        total.update(f"{name} {_known[key]}\n".encode())
    return total.hexdigest()
