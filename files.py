"""Writing files so that a name never stands for half a content, and asking beforehand whether one can write.

A crash never leaves a torn file: the content is written beside, synced to the disk, and renamed. Where the system
has files without a name, it leaves no other one either; elsewhere perhaps a hidden one beside the target.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .domain import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file to; at the end of the block it replaces `path`.

    For writers that want a name rather than bytes. When the block raises, nothing is left and `path` is as it was.

    Raises:
        OSError: The disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since some writers choose a format by it.
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Write a file whole or not at all; text as UTF-8. Missing parent folders are made.

    Raises:
        OSError: The disk does not take it; what was there before is intact.
    """
    write_all({path: data.encode("utf-8") if isinstance(data, str) else data})
    return path


def write_all(files: Mapping[Path, bytes]) -> None:
    """As `write_atomic` for several files: the disk is waited for once all are written, which is far cheaper.

    Raises:
        OSError: The disk does not take them all; each is as it was before, or whole.
    """
    beside = {path: path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}") for path in files}
    try:
        with ExitStack() as stack:
            handles: list[int] = []
            for path, data in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(_open(beside[path]))
                file.write(data)
                file.flush()
                handles.append(file.fileno())
            for handle in handles:
                os.fsync(handle)
            for (path, written), handle in zip(beside.items(), handles, strict=True):
                if not written.exists():
                    _name(handle, path, written)
        for path, written in beside.items():
            if written.exists():
                os.replace(written, path)
    except BaseException:
        for written in beside.values():
            written.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        sync(folder)


def _open(path: Path) -> BinaryIO:
    """A new file to write to, where possible without a name: then it is gone with the process."""
    if hasattr(os, "O_TMPFILE"):
        # Not every file system has them, nor every container /proc.
        with suppress(OSError):
            handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
            if os.path.exists(f"/proc/self/fd/{handle}"):
                return os.fdopen(handle, "wb")
            os.close(handle)
    return path.open("xb")


def _name(handle: int, path: Path, beside: Path) -> None:
    """Name a file of `_open` that has no name: `path`, or `beside` where there is one of that name already."""
    for name in (path, beside):
        with suppress(FileExistsError):
            # A link is followed only with a descriptor beside it.
            return os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=handle)


def check_writable(folder: Path, name: str, hint: str = "") -> None:
    """Find out, without writing anything, that files cannot be made in a folder that may not exist yet.

    Args:
        folder: The folder.
        name: What the user calls it ("home", "--out"), for the message.
        hint: How to choose another, for the message.

    Raises:
        UserError: One line that names the folder in the way.
    """
    found = folder.expanduser().absolute()
    while not found.exists():
        found = found.parent
    mend = f" ({hint})" if hint else ""
    if not found.is_dir():
        raise UserError(f"cannot write to {name} {folder}: {found} is a file{mend}")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {name} {folder}: no permission in {found}{mend}")


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk.

    Raises:
        OSError: The disk does not take it.
    """
    # Windows cannot open a folder, and keeps its entries safe by itself.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
