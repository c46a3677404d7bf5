"""The generator agent: from a request to a stored, logged picture.

It asks for one picture at a time and leaves the batching to the generator, which coalesces the requests of
all runs; so each picture is safe on disk as soon as its batch is done, and not when its round is.
"""

from __future__ import annotations

from ..events import ImageGenerated, Recorder
from ..tools.images.base import Generator, ImageRequest

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


async def paint(
    generator: Generator,
    request: ImageRequest,
    recorder: Recorder,
    *,
    run_id: str,
    round: int,
    index: int,
    node: str = "generate",
) -> ImageGenerated:
    """Make one picture, store it, log it.

    Returns:
        The committed event.

    Raises:
        Exception: What the generator or the disk raised; nothing is logged then.
    """
    [made] = await generator.generate([request])
    sha256 = await recorder.put_image(made.image)
    # What a generator leaves out: its picture says the size, and the rest stays unknown.
    known = {"model": type(generator).__name__, "height": made.image.height, "width": made.image.width}
    known |= {key: value for key, value in made.provenance.items() if key in _FIELDS}
    event = ImageGenerated(
        run_id=run_id,
        round=round,
        index=index,
        node=node,
        sha256=sha256,
        **{**known, "prompt": request.prompt, "seed": request.seed},
    )
    await recorder.record(event)
    return event
