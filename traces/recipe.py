"""How a picture was made, inside the PNG: written where a picture leaves the log, read from any file.

The log's own files stay bare: a blob is named by its content, and with a run's name in it equal pictures of two runs
would be two. The chunks are put in front of the picture's data, which is not packed anew.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import and_, select

from ..domain import EmotionTarget, UserError, first_error, first_line
from ..events import EVENT, ImageGenerated, RunStarted, Sha256
from .schema import candidates, events

if TYPE_CHECKING:
    from PIL.Image import Image

    from .store import TraceStore

#: What a picture carries, as the setting says.
Metadata = Literal["recipe", "mark", "none"]

#: Name of the chunk that holds a recipe as JSON, and its largest size in characters: a file may come from anybody.
CHUNK, _LONGEST = "emoloop", 100_000

#: Pixels of a picture that is read: it may claim more than memory holds.
_MOST_PIXELS = 50_000_000

#: Where chunks may begin: behind the signature and the header.
_HEAD = 8 + 25

#: Settings of the generator that decide about a picture and name nothing on this machine.
_SETTINGS = (
    "adapter_scale", "adapter_part", "visual_scale", "visual_guidance", "visual_negative", "negative_scale",
)  # fmt: skip

#: XMP with the IPTC's digital source type (cv.iptc.org/newscodes/digitalsourcetype): made by a trained model.
_MARK = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
)

_Pixels = Annotated[int, Field(ge=8, le=16_384)]


class Recipe(BaseModel):
    """How a picture was made; the fields of `events.ImageGenerated`, and where in the log it is.

    Attributes:
        run: The run.
        round: The round.
        candidate: Its number in the round.
        sha256: The address of the bare picture in the log.
        target: The wanted emotion, which generators with emotion tokens see.
        settings: Those of the generator that say how an adapter speaks.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    run: str = Field(max_length=128)
    round: int
    candidate: int
    sha256: Sha256
    prompt: str
    negative_prompt: str | None = None
    seed: int = Field(ge=0, lt=2**64)
    target: EmotionTarget | None = None
    model: str
    revision: str | None = None
    adapter: str | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance: float | None = None
    height: _Pixels
    width: _Pixels
    versions: dict[str, str] = {}
    settings: dict[str, Any] = {}


def find(store: TraceStore, sha256: str, run_id: str | None = None) -> tuple[Recipe, RunStarted] | None:
    """The recipe of a picture of the log, and the beginning of its run.

    Args:
        store: The log.
        sha256: Which picture.
        run_id: Whose, where several runs have it; by default the first one's.

    Returns:
        None where no run has the picture, or it was brought from elsewhere.
    """
    place = and_(*(events.c[key] == candidates.c[key] for key in ("run_id", "round", "index")))
    query = select(events.c.body).join(candidates, place)
    query = query.where(candidates.c.sha256 == sha256, events.c.type == "image_generated")
    if run_id is not None:
        query = query.where(events.c.run_id == run_id)
    with store.read() as connection:
        body = connection.scalar(query.order_by(events.c.cursor).limit(1))
        made = EVENT.validate_json(body) if body is not None else None
        if not isinstance(made, ImageGenerated) or made.seed is None or made.run_id.startswith("import-"):
            return None
        begun = select(events.c.body).where(events.c.run_id == made.run_id, events.c.type == "run_started")
        started = EVENT.validate_json(connection.scalar(begun.limit(1)) or "")
    assert isinstance(started, RunStarted)
    generator: dict[str, Any] = started.settings.get("generator", {})
    fields = made.model_dump(include=set(Recipe.model_fields) - {"settings"})
    how = {key: generator[key] for key in _SETTINGS if generator.get(key) is not None}
    where: dict[str, Any] = {"run": made.run_id, "candidate": made.index, "target": started.target}
    # The event was checked, and a generator of anybody's may say what no setting would.
    return Recipe.model_construct(**fields, **where, settings=how), started


def dressed(store: TraceStore, sha256: str, metadata: Metadata, run_id: str | None = None) -> bytes:
    """A picture of the log as it goes out: the PNG with what it shall carry.

    Args:
        store: The log.
        sha256: Which picture.
        metadata: What it carries.
        run_id: Whose, as for `find`.

    Raises:
        OSError: It is not there, or damaged.
    """
    data = store.blobs.get_bytes(sha256)
    found = find(store, sha256, run_id) if metadata != "none" else None
    return data if found is None else write(data, found[0], metadata)


def write(png: bytes, recipe: Recipe, metadata: Metadata = "recipe") -> bytes:
    """A PNG with a recipe and the mark, its picture untouched."""
    texts = {"XML:com.adobe.xmp": _MARK}
    if metadata == "recipe":
        texts[CHUNK] = recipe.model_dump_json(exclude_none=True)
    chunks = [_chunk(name, text) for name, text in texts.items() if metadata != "none"]
    return b"".join([png[:_HEAD], *chunks, png[_HEAD:]])


def _chunk(name: str, text: str) -> bytes:
    # Keyword, not compressed, no language, no translated keyword.
    body = b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def read(path: Path) -> tuple[Image, Recipe | None]:
    """A picture of a file, RGB, and its recipe; None where it carries none.

    Raises:
        UserError: The file is no PNG, is too large, or what it carries is no recipe.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(f"{path} has {image.width} × {image.height} pixels: too many")
            # Pillow bounds what text may unpack to.
            picture, text = image.convert("RGB"), image.info.get(CHUNK)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no PNG picture that can be used: {first_line(error)}") from error
    if text is None:
        return picture, None
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text)} characters")
        return picture, Recipe.model_validate_json(text)
    except ValidationError as error:
        wrong = first_error(error, "recipe")
        raise UserError(f"{path} carries a recipe that cannot be used: {wrong}") from error
    except ValueError as error:
        raise UserError(f"{path} carries a recipe that cannot be used: {error}") from error
