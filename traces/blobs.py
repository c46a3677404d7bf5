"""Content-addressed files: an image is named by the SHA-256 of its bytes.

A blob appears whole or not at all (written beside its place, synced, renamed, folder synced), so an event
that names it can be trusted after a crash. The same bytes are stored once, whoever brings them.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import sync, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image


class BlobStore:
    """Files under one folder, `ab/abcdef….png`; safe for many threads and processes.

    Args:
        folder: Where the blobs lie; made when the first one arrives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str, suffix: str = "png") -> Path:
        """Where the blob lies, or would lie."""
        return self.folder / sha256[:2] / f"{sha256}.{suffix}"

    def put_bytes(self, data: bytes, suffix: str) -> str:
        """Store bytes durably.

        Returns:
            The SHA-256 of `data` in hexadecimal.

        Raises:
            OSError: The disk refused (full, read-only); nothing is left behind.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.path(sha256, suffix)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(self.folder)
        # One that is there is written again: it may be damaged, and its time tells `TraceStore.remove` that somebody
        # wants it still.
        write_atomic(target, data)
        return sha256

    def put_image(self, image: Image) -> str:
        """Store an image as PNG, RGB; equal pixels give equal bytes and so the same address.

        Level 1 because the default level takes a third of a second for a megapixel, and metadata is dropped
        because it would change the bytes.
        """
        clean = image.convert("RGB")
        clean.info = {}
        buffer = io.BytesIO()
        clean.save(buffer, format="PNG", compress_level=1)
        return self.put_bytes(buffer.getvalue(), "png")

    def get_bytes(self, sha256: str, suffix: str = "png") -> bytes:
        """Read a blob and check it against its name.

        Raises:
            FileNotFoundError: There is no such blob.
            OSError: The file was damaged.
        """
        path = self.path(sha256, suffix)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise OSError(f"blob {path} is damaged: its content no longer matches its name")
        return data

    def get_image(self, sha256: str) -> Image:
        """Read an image, RGB."""
        from PIL import Image

        with Image.open(io.BytesIO(self.get_bytes(sha256))) as image:
            return image.convert("RGB")

    def remove(self, sha256: str, *, unless_claimed_after: float) -> int:
        """Delete the files of an address, except those that were stored again after a POSIX time.

        Returns:
            How many files are gone.
        """
        removed = 0
        for path in self.path(sha256).parent.glob(f"{sha256}.*"):
            # Out of the way before its time is read: who stores it in between finds nothing and writes anew.
            aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            os.replace(path, aside)
            if aside.stat().st_mtime > unless_claimed_after:
                os.replace(aside, path)
            else:
                aside.unlink()
                removed += 1
        return removed
