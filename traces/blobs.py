"""Content-addressed files: an image is named by the SHA-256 of its bytes.

A blob appears whole or not at all (written beside its place, synced, renamed, folder synced), so an event
that names it can be trusted after a crash. The same bytes are stored once, whoever brings them.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..domain import UserError, first_line
from ..files import sync, write_all, write_atomic
from ..settings import Settings

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
        [sha256] = self.put_many([data], suffix)
        return sha256

    def put_many(self, several: Sequence[bytes], suffix: str) -> list[str]:
        """`put_bytes` for several at once, which costs the disk far less; they are stored all or none."""
        addresses = [hashlib.sha256(data).hexdigest() for data in several]
        files = {self.path(it, suffix): data for it, data in zip(addresses, several, strict=True)}
        new = [place.parent for place in files if not place.parent.is_dir()]
        for folder in new:
            folder.mkdir(parents=True, exist_ok=True)
        if new:
            sync(self.folder)
        # One that is there is written again: it may be damaged, and its time tells `TraceStore.remove` that somebody
        # wants it still.
        write_all(files)
        return addresses

    def put_image(self, image: Image) -> str:
        """Store an image as PNG (`encode`)."""
        return self.put_bytes(encode(image), "png")

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


class RemoteBlobStore(BlobStore):
    """Blobs at an fsspec URL (`s3://bucket/folder`, `gs://…`), shared by any number of machines.

    The folder holds copies: what this machine wrote or read. They may be deleted at any time.

    Args:
        folder: Where the copies lie.
        url: Where the blobs lie. Credentials come from where its library looks for them.

    Raises:
        UserError: The URL is none, or its library is not installed.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        # Takes its time, and has no types.
        from fsspec.core import url_to_fs  # pyright: ignore

        self._remote: Any
        self._root: str
        try:
            self._remote, self._root = url_to_fs(url)  # pyright: ignore
        except (ImportError, ValueError) as error:
            raise UserError(f"setting traces.blobs_url: {first_line(error)}") from error

    def path(self, sha256: str, suffix: str = "png") -> Path:
        """Where the copy lies; it is fetched where there is none."""
        place = super().path(sha256, suffix)
        if not place.is_file():
            with suppress(OSError):  # as a local file that is not there
                self._fetch(sha256, suffix)
        return place

    def put_many(self, several: Sequence[bytes], suffix: str) -> list[str]:
        """Store bytes; they are safe once the remote has them all."""
        addresses = [hashlib.sha256(data).hexdigest() for data in several]
        with _remote_errors():
            files = {self._at(it, suffix): data for it, data in zip(addresses, several, strict=True)}
            self._remote.pipe(files)
        for sha256, data in zip(addresses, several, strict=True):
            write_atomic(super().path(sha256, suffix), data)
        return addresses

    def get_bytes(self, sha256: str, suffix: str = "png") -> bytes:
        """Read a blob and check it: the copy, or what the remote has. Errors as `BlobStore.get_bytes`."""
        place = super().path(sha256, suffix)
        with suppress(OSError):
            data = place.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        return self._fetch(sha256, suffix)

    def remove(self, sha256: str, *, unless_claimed_after: float) -> int:
        """As `BlobStore.remove`, by the store's clock, which may tell whole seconds."""
        for copy in super().path(sha256).parent.glob(f"{sha256}.*"):
            copy.unlink(missing_ok=True)
        removed = 0
        with _remote_errors():
            self._remote.invalidate_cache()
            for place in self._remote.glob(f"{self._root}/{sha256[:2]}/{sha256}.*"):
                if self._remote.modified(place).timestamp() <= unless_claimed_after:
                    self._remote.rm_file(place)
                    removed += 1
        return removed

    def _at(self, sha256: str, suffix: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}.{suffix}"

    def _fetch(self, sha256: str, suffix: str) -> bytes:
        with _remote_errors():
            data: bytes = self._remote.cat_file(self._at(sha256, suffix))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise OSError(
                f"blob {self._at(sha256, suffix)} is damaged: its content no longer matches its name"
            )
        write_atomic(super().path(sha256, suffix), data)
        return data


@contextmanager
def _remote_errors() -> Generator[None]:
    """What libraries of stores raise, as the `OSError` that a disk would give."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the blobs' store: {first_line(error)}") from error


def open_blobs(settings: Settings, home: Path) -> BlobStore:
    """The blobs of `traces.blobs_url`, or of the home; `blobs` in the home has the files, or their copies.

    Raises:
        UserError: As `RemoteBlobStore`.
    """
    folder, url = home / "blobs", settings.traces.blobs_url
    return BlobStore(folder) if url is None else RemoteBlobStore(folder, url)


def encode(image: Image) -> bytes:
    """An image as PNG, RGB; equal pixels give equal bytes and so the same address.

    Level 1 because the default level takes a third of a second for a megapixel, and metadata is dropped because it
    would change the bytes (`recipe.py` writes it where a picture leaves the log).
    """
    clean = image.convert("RGB")
    clean.info = {}
    buffer = io.BytesIO()
    clean.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
