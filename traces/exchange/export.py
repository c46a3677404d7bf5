"""What leaves the log for other tools: formats by name, each a function that writes a file or a folder.

A preference pair sets a better image against a worse one, both under the neutral prompt: what the loop found to be
better, said of the prompt that a user would type. Which of the two comes first is decided by the run's id, so that
no trainer can learn the place instead of the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...domain import UserError
from ...files import replacing
from ...tools.registry import resolve
from ..labels import of_runs
from ..rows import CandidateRow, RunFilter, RunRow
from ..store import TraceStore

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows in one row group: what is in memory at once.
_GROUP = 64

#: Writes the chosen runs, and says how many rows they gave.
Export = Callable[[TraceStore, RunFilter | None, Path], int]

#: Formats by name: what writes them, and what it counts.
FORMATS: dict[str, tuple[str, str]] = {
    "jsonl": (".traces.exchange.export:export_file", "event"),
    "pickapic": (".traces.exchange.export:export_pickapic", "pair"),
    "pickapic-all": (".traces.exchange.export:export_all_pairs", "pair"),
    "reflection": (".traces.exchange.reflection:export_reflection", "trajectory"),
    "critic-messages": (".rl.data.chats:critic_messages", "chat"),
    "critic-completion": (".rl.data.chats:critic_completion", "chat"),
    "critic-preference": (".rl.data.chats:critic_preference", "pair"),
    "rewriter-messages": (".rl.data.chats:rewriter_messages", "chat"),
    "rewriter-completion": (".rl.data.chats:rewriter_completion", "chat"),
    "rewriter-preference": (".rl.data.chats:rewriter_preference", "pair"),
}


def load_format(name: str) -> tuple[Export, str]:
    """What writes a format (a key of `FORMATS`, or the dotted path of an `Export`), and what it counts.

    Raises:
        UserError: Unknown or not importable.
    """
    path, noun = FORMATS.get(name, (name, "row"))
    return resolve(path, {key: path for key, (path, _) in FORMATS.items()}, "export format"), noun


@dataclass(frozen=True)
class Pair:
    """A preference: of one run, the better candidate and the worse one; its labels, and how many pairs it gives."""

    run: RunRow
    better: CandidateRow
    worse: CandidateRow
    labels: list[str]
    count: int


def pairs(store: TraceStore, where: RunFilter | None = None, every: bool = False) -> Iterator[Pair]:
    """The pairs of each run that has candidates of different reward, oldest run first.

    Args:
        store: The log.
        where: Which runs.
        every: Any two candidates of a run; otherwise its best one against the worst of round 0.
    """
    for run in reversed(store.runs(where)):
        rewarded = [row for row in store.candidates(run.run_id) if row.reward is not None and row.sha256]
        # Sorting and `min` keep the earliest of equals first, as the loop does.
        best = sorted(rewarded, key=lambda row: -(row.reward or 0.0))
        first = [row for row in rewarded if row.round == 0]
        if every:
            found = [(one, other) for place, one in enumerate(best) for other in best[place + 1 :]]
        else:
            found = [(best[0], min(first, key=lambda row: row.reward or 0.0))] if first else []
        found = [(better, worse) for better, worse in found if better.reward != worse.reward]
        if not found:
            continue
        with store.read() as connection:
            labels = of_runs(connection, [run.run_id])[run.run_id]
        yield from (Pair(run, better, worse, labels, len(found)) for better, worse in found)


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


def export_file(store: TraceStore, where: RunFilter | None, path: Path) -> int:
    """`export_jsonl` into a file."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        return export_jsonl(store, where, file)


def export_pickapic(store: TraceStore, where: RunFilter | None, path: Path, every: bool = False) -> int:
    """Write preference pairs as parquet, in the columns of pick-a-pic and some of our own for provenance.

    `jpg_0` and `jpg_1` hold the images' bytes as they were stored, which is PNG: readers of the schema open
    them by content, and nothing is lost. `label_0` is 1.0 where image 0 is the better one, else 0.0.

    Args:
        store: The log.
        where: Which runs.
        path: As for `write_parquet`.
        every: As for `pairs`.

    Returns:
        The number of pairs.

    Raises:
        UserError: No chosen run has a pair.
        OSError: An image is not there, or the disk refused; no file is left behind.
    """
    import pyarrow as pa

    kinds = [(name.format(side), kind) for name, kind in _BOTH.items() for side in (0, 1)] + [*_ALONE.items()]
    schema = pa.schema(
        [(name, pa.type_for_alias(kind)) for name, kind in kinds] + [("labels", pa.list_(pa.string()))]
    )
    rows = (_row(store, pair, number) for number, pair in enumerate(pairs(store, where, every)))
    return write_parquet(
        path, rows, schema, "no pairs: none of these runs has two candidates with different rewards"
    )


export_all_pairs = partial(export_pickapic, every=True)


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, nothing: str) -> int:
    """Write rows, whole or not at all.

    Args:
        path: A `.parquet` file, or a folder that gets `data/train-00000-of-00001.parquet`, where
            `datasets.load_dataset` finds it.
        rows: The rows.
        schema: Their columns.
        nothing: What to say where there is none.

    Returns:
        Their number.

    Raises:
        UserError: There is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = path if path.suffix == ".parquet" else path / "data" / "train-00000-of-00001.parquet"
    rows, count = iter(rows), 0
    group = list(islice(rows, _GROUP))
    if not group:
        raise UserError(nothing)
    with replacing(target) as beside, pq.ParquetWriter(beside, schema) as writer:
        while group:
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
            group = list(islice(rows, _GROUP))
    return count


#: Columns of a pair by arrow type: those that either side has, then those of the pair.
_BOTH = {
    "image_{}_uid": "string", "image_{}_url": "string", "jpg_{}": "binary", "label_{}": "double",
    "model_{}": "string", "prompt_{}": "string", "seed_{}": "uint64", "adapter_{}": "string", "round_{}": "int64",
    "index_{}": "int64", "reward_{}": "double",
}  # fmt: skip
_ALONE = {
    "are_different": "bool", "best_image_uid": "string", "caption": "string", "created_at": "timestamp[ns]",
    "has_label": "bool", "ranking_id": "int64", "user_id": "int64", "num_example_per_prompt": "int64",
    "run_id": "string", "target_valence": "double", "target_arousal": "double", "target_category": "string",
    "reward_name": "string", "reward_version": "string",
}  # fmt: skip


def _row(store: TraceStore, pair: Pair, number: int) -> dict[str, Any]:
    run, better, worse = pair.run, pair.better, pair.worse
    told = run.run_id if pair.count == 1 else f"{run.run_id} {better.sha256} {worse.sha256}"
    swapped = hashlib.sha256(told.encode()).digest()[0] % 2
    row: dict[str, Any] = {
        "are_different": True,
        "best_image_uid": better.sha256,
        "caption": run.prompt,
        "created_at": run.updated.replace(tzinfo=None),
        "has_label": True,
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": pair.count,
        "run_id": run.run_id,
        "labels": pair.labels,
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
