"""Preference pairs from elsewhere into the log: parquet files in the pick-a-pic schema, ours or anybody's.

Each row becomes a small finished run with two candidates, so that everything that reads the log (lists, the
viewer, distillation) takes it without knowing where it came from. Reading a file twice adds nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...domain import EmotionTarget, RunStatus, StopReason, UserError
from ...events import Event, ImageGenerated, Rewarded, RunFinished, RunStarted
from ..store import TraceStore

_NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")


def import_pickapic(
    store: TraceStore, path: Path, *, target: EmotionTarget | None = None, model: str | None = None
) -> int:
    """Add the pairs of a file or of a folder's `data/*.parquet`.

    Args:
        store: The log, open for writing.
        path: A `.parquet` file, or a folder as `emoloop traces export pickapic` writes it.
        target: The wanted emotion of rows that name none (pick-a-pic's own name none).
        model: What made the images, over what the file says: the model to train.

    Returns:
        Pairs that were added or known already; ties are passed over.

    Raises:
        UserError: No such file, a column is missing, no target, or a picture that does not open.
    """
    import pyarrow.parquet as pq

    files = sorted(path.glob("data/*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"no parquet file at {path}")
    count = 0
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is no parquet file: {str(error).splitlines()[0]}") from error
        missing = [name for name in _NEEDED if name not in table.schema_arrow.names]
        if missing:
            raise UserError(f"{file} has no column {missing[0]!r}: want pick-a-pic's {', '.join(_NEEDED)}")
        for batch in table.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                if row["label_0"] not in (0.5, None):
                    store.append(*_events(store, row, target, model, file))
                    count += 1
    return count


def _events(
    store: TraceStore, row: Mapping[str, Any], target: EmotionTarget | None, model: str | None, file: Path
) -> Iterator[Event]:
    pictures = [_bytes(row[f"jpg_{side}"], file) for side in (0, 1)]
    digest = hashlib.sha256(row["caption"].encode() + b"\0".join(pictures)).hexdigest()
    run_id = f"import-{digest[:24]}"
    wanted = _target(row) or target
    if wanted is None:
        raise UserError(
            f"{file} says no wanted emotion: give one for all its rows (--valence, --arousal, --emotion)"
        )
    own = row.get("reward_name") is not None
    yield RunStarted(run_id=run_id, prompt=row["caption"], target=wanted, seed=0)
    rewards = []
    for side, picture in enumerate(pictures):
        width, height, sha256 = _put(store, picture, file)
        label = float(row["label_0"]) if side == 0 else 1 - float(row["label_0"])
        rewards.append(row[f"reward_{side}"] if own else label)
        place = {"run_id": run_id, "round": row.get(f"round_{side}") or 0}
        index = row.get(f"index_{side}")
        place["index"] = side if index is None else index
        yield ImageGenerated(
            **place, sha256=sha256, prompt=row.get(f"prompt_{side}") or row["caption"],
            seed=row.get(f"seed_{side}"), model=model or row.get(f"model_{side}") or "unknown",
            adapter=row.get(f"adapter_{side}"), steps=None, guidance=None, height=height, width=width,
        )  # fmt: skip
        yield Rewarded(
            **place, sha256=sha256, name=row["reward_name"] if own else "label",
            version=(row.get("reward_version") or "1") if own else "1", value=rewards[-1],
        )  # fmt: skip
    yield RunFinished(
        run_id=run_id, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED,
        best_gain=None, warnings=[f"imported from {file.name}"],
    )  # fmt: skip


def _bytes(value: Any, file: Path) -> bytes:
    # `datasets` wraps images as {"bytes": …, "path": …}.
    found = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(found, bytes):
        raise UserError(f"{file} has a row without the bytes of its pictures: export it with them")
    return found


def _put(store: TraceStore, picture: bytes, file: Path) -> tuple[int, int, str]:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(picture)) as image:
            # People rated what their viewer showed, which is the picture as its EXIF turns it.
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} holds a picture that does not open: {error}") from error
    return *rgb.size, store.blobs.put_image(rgb)


def _target(row: Mapping[str, Any]) -> EmotionTarget | None:
    named = {axis: row.get(f"target_{axis}") for axis in ("valence", "arousal", "category")}
    return EmotionTarget(**named) if any(value is not None for value in named.values()) else None
