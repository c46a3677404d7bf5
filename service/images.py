"""Pictures and their small copies. A picture never changes, so that a browser may keep it for a year."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

from ..domain import UserError
from ..tools.images.base import encoded
from ..traces.blobs import BlobStore
from ..traces.recipe import Metadata, dressed
from ..traces.store import TraceStore
from .errors import NotFound

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels of a picture that is made smaller: a picture may claim more than memory holds.
_MOST_PIXELS = 50_000_000


def picture(store: TraceStore, sha256: str, metadata: Metadata) -> bytes:
    """A picture as PNG, with what it shall carry; one whose content is not what its name says is none.

    Raises:
        NotFound: There is no such picture, or it is damaged.
    """
    try:
        return dressed(store, sha256, metadata)
    except OSError as error:
        raise NotFound(f"no picture {sha256}") from error


def original(store: TraceStore, sha256: str) -> Image:
    """A picture as it is in the log.

    Raises:
        NotFound: There is no such picture, or it is damaged.
    """
    try:
        return store.blobs.get_image(sha256)
    except OSError as error:
        raise NotFound(f"no picture {sha256}") from error


@lru_cache(4096)
def thumbnail(blobs: BlobStore, sha256: str, side: int) -> bytes:
    """A copy of at most `side` pixels each way, as WebP; a small picture keeps its size.

    Raises:
        NotFound: There is no such picture, or it is damaged.
        UserError: It is too large, or no picture.
    """
    from PIL import Image

    try:
        data = io.BytesIO(blobs.get_bytes(sha256))
    except OSError as error:
        raise NotFound(f"no picture {sha256}") from error
    try:
        with Image.open(data, formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(
                    f"picture {sha256} has {image.width} × {image.height} pixels: too many to show small"
                )
            small = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"blob {sha256} is no picture") from error
    small.thumbnail((side, side))
    return encoded(small, "WEBP", quality=82, method=2)
