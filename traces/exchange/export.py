"""What leaves the log for other tools: events as JSON lines, preference pairs in the pick-a-pic schema.

A pair sets the best image of the winning round against the worst of round 0, both under the neutral prompt:
what the loop found to be better, said of the prompt that a user would type. Which of the two comes first is
decided by the run's id, so that no trainer can learn the place instead of the picture.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ...domain import UserError
from ..rows import CandidateRow, RunFilter, RunRow
from ..store import TraceStore
from .reflection import export_reflection

if TYPE_CHECKING:
    import pyarrow as pa

#: Pairs in one row group: what is in memory at once.
_GROUP = 64


class Pair(NamedTuple):
    """A preference: of one run, the better candidate and the worse one."""

    run: RunRow
    better: CandidateRow
    worse: CandidateRow


def pairs(store: TraceStore, where: RunFilter | None = None) -> Iterator[Pair]:
    """One pair for each run that has two candidates of different reward, oldest run first.

    In a run that never got beyond round 0 both come from round 0.
    """
    for run in reversed(store.runs(where)):
        rewarded = [row for row in store.candidates(run.run_id) if row.reward is not None and row.sha256]
        first = [row for row in rewarded if row.round == 0]
        if not first:
            continue
        # `max` and `min` keep the earliest of equals, as the loop does.
        better = max(rewarded, key=lambda row: row.reward or 0.0)
        worse = min(first, key=lambda row: row.reward or 0.0)
        if better.reward != worse.reward:
            yield Pair(run, better, worse)


def export_jsonl(store: TraceStore, where: RunFilter | None, file: IO[str]) -> int:
    """Write every event of the chosen runs, one JSON object a line, oldest run first.

    Returns:
        The number of events.
    """
    count = 0
    for run in reversed(store.runs(where)):
        for event in store.events(run.run_id):
            file.write(event.model_dump_json() + "\n")
            count += 1
    return count


def export_pickapic(store: TraceStore, where: RunFilter | None, path: Path) -> int:
    """Write preference pairs as parquet, in the columns of pick-a-pic and some of our own for provenance.

    `jpg_0` and `jpg_1` hold the images' bytes as they were stored, which is PNG: readers of the schema open
    them by content, and nothing is lost. `label_0` is 1.0 where image 0 is the better one, else 0.0.

    Args:
        store: The log.
        where: Which runs.
        path: A `.parquet` file, or a folder that gets `data/train-00000-of-00001.parquet`.

    Returns:
        The number of pairs.

    Raises:
        UserError: No chosen run has a pair.
        OSError: An image is not there, or the disk refused; no file is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = path if path.suffix == ".parquet" else path / "data" / "train-00000-of-00001.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    schema, count, rows = _schema(), 0, []
    try:
        with pq.ParquetWriter(beside, schema) as writer:
            for count, pair in enumerate(pairs(store, where), start=1):
                rows.append(_row(store, pair, count - 1))
                if len(rows) == _GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
        if not count:
            raise UserError("no pairs: none of these runs has two candidates with different rewards")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _jsonl_file(store: TraceStore, where: RunFilter | None, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        return export_jsonl(store, where, file)


#: Formats by name: what writes a file or folder, and what it counts.
FORMATS: dict[str, tuple[Callable[[TraceStore, RunFilter | None, Path], int], str]] = {
    "jsonl": (_jsonl_file, "event"),
    "pickapic": (export_pickapic, "pair"),
    "reflection": (export_reflection, "trajectory"),
}


def _schema() -> pa.Schema:
    import pyarrow as pa

    both = {
        "image_{}_uid": pa.string(),
        "image_{}_url": pa.string(),
        "jpg_{}": pa.binary(),
        "label_{}": pa.float64(),
        "model_{}": pa.string(),
        "prompt_{}": pa.string(),
        "seed_{}": pa.uint64(),
        "adapter_{}": pa.string(),
        "round_{}": pa.int64(),
        "index_{}": pa.int64(),
        "reward_{}": pa.float64(),
    }
    alone = {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "run_id": pa.string(),
        "target_valence": pa.float64(),
        "target_arousal": pa.float64(),
        "target_category": pa.string(),
        "reward_name": pa.string(),
        "reward_version": pa.string(),
    }
    pairwise = {name.format(side): kind for name, kind in both.items() for side in (0, 1)}
    return pa.schema([pa.field(name, kind) for name, kind in (pairwise | alone).items()])


def _row(store: TraceStore, pair: Pair, number: int) -> dict[str, Any]:
    run, better, worse = pair
    swapped = hashlib.sha256(run.run_id.encode()).digest()[0] % 2
    row: dict[str, Any] = {
        "are_different": True,
        "best_image_uid": better.sha256,
        "caption": run.prompt,
        "created_at": run.updated.replace(tzinfo=None),
        "has_label": True,
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": 1,
        "run_id": run.run_id,
        "target_valence": run.valence,
        "target_arousal": run.arousal,
        "target_category": run.category,
        "reward_name": better.reward_name,
        "reward_version": better.reward_version,
    }
    for side, candidate in enumerate((worse, better) if swapped else (better, worse)):
        row |= {
            f"image_{side}_uid": candidate.sha256,
            f"image_{side}_url": "",
            f"jpg_{side}": store.blobs.get_bytes(candidate.sha256 or ""),
            f"label_{side}": float(candidate is better),
            f"model_{side}": candidate.model,
            f"prompt_{side}": candidate.prompt,
            # As torch does with a negative one.
            f"seed_{side}": None if candidate.seed is None else candidate.seed % 2**64,
            f"adapter_{side}": candidate.adapter,
            f"round_{side}": candidate.round,
            f"index_{side}": candidate.index,
            f"reward_{side}": candidate.reward,
        }
    return row
