"""Durable events a second: many writers on one log, beside the same rows and commits by hand-written SQL.

Then writers that are killed at a moment of chance: what a log acknowledged has to be there, once.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from ...domain import EmotionTarget, Failure
from ...events import Event, ImageGenerated, RunStarted
from ...settings import Settings, load_settings
from ...traces.recorder import open_recorder
from ...traces.store import open_store
from .fakes import picture
from .postgres import missing, server

#: A writer is killed after so many seconds of writing at most.
_LIFE = 0.2


def main(
    writers: int = 16, events: int = 500, repeats: int = 3, kills: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Durable events a second, lost and doubled ones, against hand-written SQL; and on a PostgreSQL that syncs.

    Args:
        writers: Runs that are written at the same time, one event at a time.
        events: Events of each.
        repeats: How often both are measured in turn; medians count.
        kills: Writers that are killed by SIGKILL, one after the other, each on what the last one left.
        seed: Of the moments at which they are killed.
    """
    total, found = writers * events, Counter[str]()
    ours: list[float] = []
    by_hand: list[float] = []
    on_postgres: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="emoloop-log-") as folder:
            commits: list[list[Event]] = []
            settings = load_settings({"home": folder})
            seconds, told = asyncio.run(_write(settings, writers, events, commits))
            ours.append(total / seconds)
            found += _wrong(settings, told)
            by_hand.append(total / _write_by_hand(Path(folder, "events.db"), commits))
            if missing() is None:
                with server(durable=True) as postgres:
                    settings = load_settings({"home": folder, "traces": {"database_url": postgres.url}})
                    seconds, told = asyncio.run(_write(settings, writers, events, []))
                    on_postgres.append(total / seconds)
                    found += _wrong(settings, told)
    with tempfile.TemporaryDirectory(prefix="emoloop-log-") as folder:
        killed = _kill_writers(Path(folder), kills, random.Random(seed))
    figures = {
        "events_per_second": median(ours),
        "events_per_second_hand_written": median(by_hand),
        "ratio_hand_written": median(mine / theirs for mine, theirs in zip(ours, by_hand, strict=True)),
        "lost": found["lost"] + killed["lost"],
        "doubled": found["doubled"] + killed["doubled"],
        "kills": kills,
        "acknowledged": killed["acknowledged"],
        "files_left": killed["files_left"],
    }
    if on_postgres:
        figures["postgres_events_per_second"] = median(on_postgres)
    return {"figures": figures, "n": repeats}


async def _write(
    settings: Settings, writers: int, count: int, commits: list[list[Event]]
) -> tuple[float, list[tuple[Any, ...]]]:
    """Seconds, and the keys of what was acknowledged."""
    told: list[Event] = []
    async with open_recorder(settings) as recorder:
        recorder.store.subscribers.append(lambda events: commits.append(list(events)))

        async def write(run_id: str) -> None:
            target = EmotionTarget(valence=2.0, arousal=-1.0)
            told.extend(
                await recorder.record(RunStarted(run_id=run_id, prompt="a dog", target=target, seed=1))
            )
            for n in range(count - 1):
                place: Any = {"run_id": run_id, "round": n // 8, "index": n % 8, "sha256": f"{n:064x}"}
                made = ImageGenerated(**place, prompt="a dog", seed=n, model="fake", height=96, width=96)
                told.extend(await recorder.record(made))

        began = time.perf_counter()
        await asyncio.gather(*(write(f"run-{number}") for number in range(writers)))
        return time.perf_counter() - began, [event.key for event in told]


def _wrong(settings: Settings, told: Sequence[tuple[Any, ...]]) -> Counter[str]:
    """How many of the acknowledged keys a log lost, and how many events stand in it twice."""
    with open_store(settings, read_only=True) as store:
        kept = Counter(event.key for event in store.tail(0, 10**9))
    return Counter(lost=len(set(told) - set(kept)), doubled=kept.total() - len(kept))


def _kill_writers(home: Path, kills: int, rng: random.Random) -> Counter[str]:
    """What is wrong with a log whose writers were killed: acknowledged events lost, doubled ones, files left over."""
    told: list[tuple[Any, ...]] = []
    # Its children start at once, from a process that has loaded this module and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for number in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=_write_until_killed, args=(str(home), number, sender))
        writer.start()
        sender.close()
        receiver.poll(60)  # the first event is acknowledged
        time.sleep(rng.uniform(0, _LIFE))
        writer.kill()
        writer.join()
        try:
            while True:
                told += receiver.recv()
        except EOFError:
            pass
    if kills and not told:
        raise Failure(f"none of {kills} writers lived to acknowledge an event: nothing was tried")
    settings = load_settings({"home": str(home)})
    with open_store(settings) as store:
        pictures = [file for file in home.joinpath("blobs").rglob("*") if file.is_file()]
        files_left = sum(store.blobs.path(file.stem) != file for file in pictures)
    return Counter(acknowledged=len(told), files_left=files_left) + _wrong(settings, told)


def _write_until_killed(home: str, number: int, told: Connection) -> None:
    async def write() -> None:
        async with open_recorder(load_settings({"home": home})) as recorder:

            async def one(run_id: str, first: int) -> None:
                target = EmotionTarget(valence=2.0, arousal=-1.0)
                begun = RunStarted(run_id=run_id, prompt="a dog", target=target, seed=1)
                told.send([it.key for it in await recorder.record(begun)])
                for n in range(10**6):
                    sha = await asyncio.to_thread(recorder.store.blobs.put_image, picture(first + n))
                    place: Any = {"run_id": run_id, "round": n // 8, "index": n % 8, "sha256": sha}
                    made = ImageGenerated(**place, prompt="a dog", seed=n, model="fake", height=96, width=96)
                    told.send([it.key for it in await recorder.record(made)])

            await asyncio.gather(
                *(one(f"killed-{number}-{run}", 10**6 * (4 * number + run)) for run in range(4))
            )

    asyncio.run(write())


def _write_by_hand(log: Path, commits: Sequence[Sequence[Event]]) -> float:
    """The same rows into the same tables of another file, in transactions of the same events.

    The rows are at hand; what a program has to do for each event beside SQL is to make its JSON.
    """
    with (
        closing(sqlite3.connect(log)) as source,
        closing(sqlite3.connect(log.with_name("by-hand.db"), isolation_level=None)) as target,
    ):
        for pragma in ("page_size=1024", "journal_mode=WAL", "wal_autocheckpoint=4000", "synchronous=FULL"):
            target.execute(f"PRAGMA {pragma}")
        for [sql] in source.execute(
            "SELECT sql FROM sqlite_master WHERE sql > '' AND name NOT LIKE 'sqlite_%'"
        ):
            target.execute(sql)
        rows: dict[str, dict[Any, tuple[Any, ...]]] = {}
        statements: dict[str, str] = {}
        for table, key in (("events", slice(1, 3)), ("candidates", slice(0, 3)), ("runs", slice(0, 1))):
            cursor = source.execute(f"SELECT * FROM {table}")
            names = [f'"{column[0]}"' for column in cursor.description]
            keys = "cursor" if table == "events" else ", ".join(names[key])
            changes = ", ".join(f"{name} = excluded.{name}" for name in names)
            statements[table] = (
                f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
                f"ON CONFLICT ({keys}) DO UPDATE SET {changes}"
            )
            rows[table] = {row[key]: row for row in cursor}
        bodies = {id(event): event.model_dump(mode="json") for commit in commits for event in commit}
        began = time.perf_counter()
        for commit in commits:
            told = [(*rows["events"][e.run_id, e.seq][:-1], json.dumps(bodies[id(e)])) for e in commit]
            made = [rows["candidates"][e.run_id, e.round, e.index] for e in commit if e.type != "run_started"]
            target.execute("BEGIN IMMEDIATE")
            target.executemany(statements["events"], told)
            target.executemany(statements["candidates"], made)
            target.executemany(
                statements["runs"], [rows["runs"][run_id,] for run_id in {e.run_id for e in commit}]
            )
            target.execute("COMMIT")
        return time.perf_counter() - began
