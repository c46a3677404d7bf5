"""The generator agent: from a request to a stored, logged picture.

It asks for one picture at a time and leaves the batching to the generator, which coalesces the requests of
all runs; so each picture is safe on disk as soon as its batch is done, and not when its round is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..events import Event, ImageGenerated
from ..tools.images.base import Generator, ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

_FIELDS = set(ImageGenerated.model_fields) - {
    "run_id",
    "seq",
    "time",
    "round",
    "node",
    "index",
    "type",
    "sha256",
}


class Log(Protocol):
    """Where pictures and events go."""

    async def put_image(self, image: Image) -> str:
        """Store an image; return its SHA-256."""
        ...

    async def record(self, *events: Event) -> list[Event]:
        """Commit events; return them as the log holds them."""
        ...


async def paint(
    generator: Generator,
    request: ImageRequest,
    log: Log,
    *,
    run_id: str,
    round: int,
    index: int,
    node: str = "generate",
) -> ImageGenerated:
    """Make one picture, store it, log it.

    Returns:
        The event as the log holds it: another one where the candidate was there already.

    Raises:
        Exception: What the generator or the disk raised; nothing is logged then.
    """
    [made] = await generator.generate([request])
    sha256 = await log.put_image(made.image)
    # What a generator leaves out: its picture says the size, and the rest stays unknown.
    known: dict[str, Any] = {
        "model": type(generator).__name__,
        "height": made.image.height,
        "width": made.image.width,
    }
    known |= {key: value for key, value in made.provenance.items() if key in _FIELDS}
    known |= {"prompt": request.prompt, "seed": request.seed}
    event = ImageGenerated(run_id=run_id, round=round, index=index, node=node, sha256=sha256, **known)
    [stands] = await log.record(event)
    assert isinstance(stands, ImageGenerated)
    return stands
