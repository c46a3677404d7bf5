"""What people said elsewhere into the log: preferences in the layouts of pick-a-pic and HPD, ratings of its pictures.

A preference becomes a small finished run with its pictures as candidates, so that everything that reads the log
(lists, the viewer, distillation) takes it without knowing where it came from. A rating becomes feedback on the runs
that have the picture. Reading a file twice adds nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...domain import HIGH, LOW, EmotionTarget, RunStatus, StopReason, UserError, first_line, read_target
from ...events import Event, HumanFeedback, ImageGenerated, Rewarded, RunFinished, RunStarted
from ..store import TraceStore

if TYPE_CHECKING:
    from PIL.Image import Image

_NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
_AXES = ("valence", "arousal")


def import_file(
    store: TraceStore,
    path: Path,
    *,
    target: EmotionTarget | None = None,
    model: str | None = None,
    scale: tuple[float, float] = (LOW, HIGH),
) -> tuple[int, str]:
    """Add a file of any layout: `.csv` holds ratings, `.json` is HPD's, all else pick-a-pic's.

    Returns:
        How many entries were added or known already, and what one is called.

    Raises:
        UserError: As the three functions below.
    """
    if path.suffix == ".csv":
        return import_ratings(store, path, scale), "rating"
    read = import_hpd if path.suffix == ".json" else import_pickapic
    return read(store, path, target=target, model=model), "pair" if read is import_pickapic else "preference"


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
            raise UserError(f"{file} is no parquet file: {first_line(error)}") from error
        missing = [name for name in _NEEDED if name not in table.schema_arrow.names]
        if missing:
            raise UserError(f"{file} has no column {missing[0]!r}: want pick-a-pic's {', '.join(_NEEDED)}")
        rows = (row for batch in table.iter_batches(batch_size=32) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            if row["label_0"] not in (0.5, None):
                with _told(f"{file}, row {number}"):
                    given = {axis: row.get(f"target_{axis}") for axis in (*_AXES, "category")}
                    own = any(value is not None for value in given.values())
                    shots = [_shot(row, side) for side in (0, 1)]
                    _take(store, file, row["caption"], read_target(given) if own else target, shots, model)
                count += 1
    return count


def import_hpd(
    store: TraceStore, path: Path, *, target: EmotionTarget | None = None, model: str | None = None
) -> int:
    """Add the preferences of an annotation file of HPD v2 (arXiv 2306.09341), whose pictures lie beside it.

    `human_preference` is taken as a label, 1 for what was preferred; an averaged `rank`, of which less is better, as
    its negative. Arguments, result and errors are those of `import_pickapic`.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = [
            (row, [*zip(row.get("file_path") or row["image_path"], _values(row), strict=True)])
            for row in rows
        ]
        captions = [str(row["prompt"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no annotation file of HPD ({error}): want a list of prompt, image_path, and "
            "human_preference or rank"
        ) from error
    for number, ((row, pictures), caption) in enumerate(zip(found, captions, strict=True), start=1):
        name = "label" if "human_preference" in row else "rank"
        with _told(f"{path}, row {number}"):
            shots = [
                {"picture": _read(path.parent / place), "reward": value, "name": name, "version": "1"}
                for place, value in pictures
            ]
            _take(store, path, caption, target, shots, model)
    return len(found)


def import_ratings(store: TraceStore, path: Path, scale: tuple[float, float] = (LOW, HIGH)) -> int:
    """Add people's ratings of pictures of the log; of several for one picture the mean counts.

    Args:
        store: The log, open for writing.
        path: CSV with `sha256` and any of `valence`, `arousal` and `rating`; an empty cell says nothing.
        scale: The ends of the scale of valence and arousal, which are brought to ours from -3 to 3. `rating` is kept
            as it is: only its order counts.

    Returns:
        Ratings read.

    Raises:
        UserError: No such file, an unknown column, a number beyond the scale, or a picture that no run has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    unknown = set(rows.fieldnames or ()) - {"sha256", *_AXES, "rating"}
    if unknown or "sha256" not in (rows.fieldnames or ()):
        raise UserError(
            f"{path}: the columns sha256, valence, arousal and rating are known, and sha256 is needed"
        )
    read: dict[str, dict[str, list[float]]] = {}
    count = 0
    for row in rows:
        count += 1
        if None in row:
            raise UserError(f"{path}, line {rows.line_num} has more cells than the first line has columns")
        for key, cell in row.items():
            if key != "sha256" and cell:
                value = _number(cell, scale if key in _AXES else None, f"{path}, line {rows.line_num}: {key}")
                read.setdefault(row["sha256"], {}).setdefault(key, []).append(value)
    runs: dict[str, dict[str, int]] = {}
    for it in store.candidates():
        if it.sha256 in read:
            runs.setdefault(it.sha256, {}).setdefault(it.run_id, it.round)
    if lost := sorted(read.keys() - runs):
        raise UserError(f"{path} rates {lost[0]!r}, which no run of this log has")
    file = hashlib.sha256(text.encode()).hexdigest()[:16]
    for sha256, given in read.items():
        means: dict[str, Any] = {key: sum(values) / len(values) for key, values in given.items()}
        comment = f"mean of {max(map(len, given.values()))} from {path.name}"
        said = {"sha256": sha256, "node": f"human rating {sha256} {file}", "comment": comment, **means}
        store.append(*(HumanFeedback(run_id=run_id, round=it, **said) for run_id, it in runs[sha256].items()))
    return count


def _number(cell: str, scale: tuple[float, float] | None, where: str) -> float:
    """A number of a cell; one on a scale as it stands on ours."""
    low, high = scale or (float("-inf"), float("inf"))
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not (low <= value <= high and abs(value) < float("inf")):
        raise UserError(
            f"{where} {cell!r} is no number on the scale {low:g}..{high:g} (declare it: --scale 1..9)"
        )
    return value if scale is None else LOW + (value - low) / (high - low) * (HIGH - LOW)


def _values(row: Mapping[str, Any]) -> list[float]:
    if "human_preference" in row:
        return [float(value) for value in row["human_preference"]]
    return [-float(value) for value in row["rank"]]


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What is wrong with a row, with the place where it stands."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def _shot(row: Mapping[str, Any], side: int) -> dict[str, Any]:
    """One picture of a row of pick-a-pic, with what the row says of it."""
    value = row[f"jpg_{side}"]
    # `datasets` wraps images as {"bytes": …, "path": …}.
    picture = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(picture, bytes):
        raise UserError("the bytes of its pictures are missing: export the file with them")
    label = float(row["label_0"]) if side == 0 else 1 - float(row["label_0"])
    own = row.get("reward_name") is not None
    said = {key: row.get(f"{key}_{side}") for key in ("round", "index", "prompt", "seed", "model", "adapter")}
    return said | {
        "picture": picture,
        "reward": row[f"reward_{side}"] if own else label,
        "name": row["reward_name"] if own else "label",
        "version": (row.get("reward_version") or "1") if own else "1",
    }


def _take(
    store: TraceStore,
    file: Path,
    caption: Any,
    target: EmotionTarget | None,
    shots: Sequence[Mapping[str, Any]],
    model: str | None,
) -> None:
    """Append a finished run whose candidates are the pictures; a run that is there must be the same.

    Raises:
        UserError: No caption, no target, or a picture that does not open.
    """
    if target is None:
        raise UserError("no wanted emotion: give one for all rows (--valence, --arousal, --emotion)")
    if not isinstance(caption, str):
        raise UserError(f"the caption must be text, not {caption!r}")
    given = list(_events(store, file, caption, target, shots, model))
    for there, new in zip(store.append(*given), given, strict=True):
        same = (getattr(there, key, None) == getattr(new, key, None) for key in ("target", "model"))
        if not all(same):
            raise UserError(
                "the log has it with another target or model; "
                f"to take it anew, remove that one: emoloop traces rm {new.run_id}"
            )


def _events(
    store: TraceStore,
    file: Path,
    caption: str,
    target: EmotionTarget,
    shots: Sequence[Mapping[str, Any]],
    model: str | None,
) -> Iterator[Event]:
    digest = hashlib.sha256(caption.encode() + b"\0".join(shot["picture"] for shot in shots)).hexdigest()
    run_id = f"import-{digest[:24]}"
    yield RunStarted(run_id=run_id, prompt=caption, target=target, seed=0)
    for number, shot in enumerate(shots):
        image = _open(shot["picture"])
        sha256, (width, height) = store.blobs.put_image(image), image.size
        index = number if shot.get("index") is None else shot["index"]
        place = {"run_id": run_id, "round": shot.get("round") or 0, "index": index}
        yield ImageGenerated(
            **place, sha256=sha256, prompt=shot.get("prompt") or caption, seed=shot.get("seed"),
            model=model or shot.get("model") or "unknown", adapter=shot.get("adapter"), steps=None, guidance=None,
            height=height, width=width,
        )  # fmt: skip
        yield Rewarded(
            **place, sha256=sha256, name=shot["name"], version=shot["version"], value=shot["reward"]
        )
    yield RunFinished(
        run_id=run_id, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED,
        best_gain=None, warnings=[f"imported from {file.name}"],
    )  # fmt: skip


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"a picture cannot be read: {error}") from error


def _open(picture: bytes) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(picture)) as image:
            # People rated what their viewer showed, which is the picture as its EXIF turns it.
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"a picture does not open: {error}") from error
