"""Tables of pictures as people keep them: JSON lines, CSV or parquet, beside the pictures or with them inside."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..domain import UserError, first_line

KINDS = (".jsonl", ".csv", ".parquet")


def table(path: Path) -> Path:
    """A folder's table, or the file itself: `metadata.*`, as in Hugging Face's folders, or the only one there.

    Raises:
        UserError: No table, or several.
    """
    if path.is_file() and path.suffix in KINDS:
        return path
    for kind in KINDS:
        if (named := path / f"metadata{kind}").is_file():
            return named
    there = sorted(it for it in path.iterdir() if it.suffix in KINDS) if path.is_dir() else []
    if len(there) != 1:
        names = ", ".join(it.name for it in there) or "none"
        raise UserError(f"{path}: one table ({', '.join(KINDS)}) is wanted, there is {names}")
    return there[0]


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table by their columns.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(file).iter_batches(256):
                yield from batch.to_pylist()
            return
        # A spreadsheet program's CSV begins with a byte order mark.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                yield from csv.DictReader(lines)
                return
            for row in (json.loads(line) for line in lines if line.strip()):
                if not isinstance(row, dict):
                    raise ValueError("each line must be a JSON object")
                yield row
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
