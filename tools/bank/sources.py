"""Image-text sets as a bank's items: a table (CSV, JSONL or Parquet) with pictures beside it or inside.

Columns: the picture is `file_name`, `image` or `path` (in Parquet also bytes, or the `{bytes, path}` of Hugging Face
datasets), its text `text`, `caption` or `prompt`, its emotion `emotion` or `category`, or `valence` and `arousal` in
[-3, 3]. The log's own best pictures are a source too: `traced`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import ValidationError

from ...domain import EmotionTarget, UserError
from .. import tables
from .bank import Item

if TYPE_CHECKING:
    from ...traces.rows import RunFilter
    from ...traces.store import TraceStore

_PICTURE, _TEXT = ("file_name", "image", "path"), ("text", "caption", "prompt")


def table(path: Path) -> Iterator[Item]:
    """The items of a table, or of the one table in a folder.

    Raises:
        UserError: No table, several, or a row that lacks something.
    """
    path = tables.table(path)
    for number, row in enumerate(tables.rows(path), 1):
        try:
            yield _item(row, path.parent)
        except (KeyError, ValueError) as error:
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.args[0]
            raise UserError(f"{path}, row {number}: {told}") from error


def traced(store: TraceStore, where: RunFilter) -> Iterator[Item]:
    """The best picture of each run, with the prompt that made it and the emotion that the critic read in it.

    What was read, since a best picture may still have missed what was wanted.
    """
    best = {
        (row.run_id, row.best_round, row.best_index)
        for row in store.runs(where)
        if row.best_sha256 is not None
    }
    for it in store.candidates(where=where):
        if (it.run_id, it.round, it.index) in best and it.sha256 and it.prompt and it.valence is not None:
            felt = EmotionTarget(valence=it.valence, arousal=it.arousal)
            yield Item(it.prompt, partial(store.blobs.get_image, it.sha256), felt)


def _item(row: Mapping[str, Any], folder: Path) -> Item:
    picture, text = (_first(row, names) for names in (_PICTURE, _TEXT))
    emotion = row.get("emotion") or row.get("category")
    axes = {name: float(row[name]) for name in ("valence", "arousal") if row.get(name) not in (None, "")}
    target = EmotionTarget.model_validate({"category": emotion and str(emotion).lower(), **axes})
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture["path"]
    source = picture if isinstance(picture, bytes) else folder / str(picture)
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"no picture {source}")
    return Item(str(text), partial(_open, source), target)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise KeyError(f"one of the columns {', '.join(names)} is wanted")


def _open(source: Path | bytes) -> Image.Image:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        return picture.convert("RGB")
