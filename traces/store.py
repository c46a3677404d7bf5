"""The trace store: one database of events, one folder of blobs.

An append is one transaction and returns when it is durable (`database.py` says what that costs). Everything
here is synchronous and safe for many threads; `recorder.py` is the door for async code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, Engine, and_, delete, func, insert, or_, select

from ..domain import UserError
from ..events import EVENT, Event
from ..settings import Settings
from . import derive, migrate
from .blobs import BlobStore
from .database import WRITES, StoreError, lock, open_database, store_errors
from .rows import CandidateRow, RunFilter, RunRow
from .schema import candidates, events, runs

__all__ = ["CandidateRow", "RunFilter", "RunRow", "StoreError", "TraceStore", "open_store"]


class TraceStore:
    """Events, derived tables and blobs. Safe for many threads; open one per process.

    Use `open_store`. All methods raise `StoreError` where the database fails.

    Args:
        engine: The database, at `TABLES_VERSION`.
        blobs: The files that the events name.
        home: The folder that holds both (a database by URL lies elsewhere).
    """

    def __init__(self, engine: Engine, blobs: BlobStore, home: Path) -> None:
        self.blobs = blobs
        self.home = home
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})

    def append(self, *batch: Event) -> list[int]:
        """Write events in one transaction; return when they are durable.

        An event whose idempotency key is known is skipped, the first one stands.

        Returns:
            The `seq` of each event, in the order given; for a known one the `seq` it has had.
        """
        if not batch:
            return []
        with self._write() as connection:
            run_ids = sorted({event.run_id for event in batch})
            lock(connection, *run_ids)
            known: dict[tuple[str, int, str, int], int] = {}
            following: dict[str, int] = {}
            for run_id in run_ids:
                rounds = {event.round for event in batch if event.run_id == run_id}
                columns = (events.c.round, events.c.node, events.c.index, events.c.seq)
                for round_, node, index, seq in connection.execute(
                    select(*columns).where(events.c.run_id == run_id, events.c.round.in_(rounds))
                ):
                    known[run_id, round_, node, index] = seq
                last = connection.scalar(select(func.max(events.c.seq)).where(events.c.run_id == run_id))
                following[run_id] = 0 if last is None else last + 1
            fresh: list[Event] = []
            for event in batch:
                if event.key not in known:
                    known[event.key] = following[event.run_id]
                    following[event.run_id] += 1
                    fresh.append(event.model_copy(update={"seq": known[event.key]}))
            if fresh:
                connection.execute(insert(events), [migrate.row_of(event) for event in fresh])
                derive.apply(connection, fresh)
        return [known[event.key] for event in batch]

    def events(self, run_id: str) -> list[Event]:
        """The run's events in order of `seq`; empty for an unknown run."""
        query = select(events.c.body).where(events.c.run_id == run_id).order_by(events.c.seq)
        with self.read() as connection:
            return [EVENT.validate_json(body) for body in connection.scalars(query)]

    def runs(self, where: RunFilter | None = None) -> list[RunRow]:
        """Runs, newest first."""
        query = (where or RunFilter()).apply(select(runs))
        with self.read() as connection:
            return [RunRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def candidates(
        self, run_id: str | None = None, *, where: RunFilter | None = None
    ) -> Iterator[CandidateRow]:
        """Candidates of one run, or of those that a filter picks, in order of run, round and index.

        The rows come in one read transaction that stays open while the iterator lives.
        """
        if run_id is not None:
            chosen = candidates.c.run_id == run_id
        else:
            chosen = candidates.c.run_id.in_((where or RunFilter()).apply(select(runs.c.run_id)))
        query = select(candidates).where(chosen)
        query = query.order_by(candidates.c.run_id, candidates.c.round, candidates.c.index)
        with self.read() as connection:
            for row in connection.execution_options(yield_per=500).execute(query).mappings():
                yield CandidateRow.model_validate(dict(row))

    def resolve(self, name: str) -> str:
        """A run id from itself, from its unambiguous beginning, or from "last".

        Raises:
            UserError: No run, or several, answer to it.
        """
        if not name.strip():
            raise UserError("the name of a run is empty (see `emoloop traces list`)")
        if name == "last":
            found = [row.run_id for row in self.runs(RunFilter(limit=1))]
        else:
            query = select(runs.c.run_id).where(runs.c.run_id.startswith(name, autoescape=True)).limit(5)
            with self.read() as connection:
                found = list(connection.scalars(query))
            found = [name] if name in found else found
        if not found:
            raise UserError(f"no run {name!r} in {self.home} (see `emoloop traces list`)")
        if len(found) > 1:
            raise UserError(f"{name!r} may be any of {', '.join(found)}: give more of it")
        return found[0]

    def remove(self, *run_ids: str) -> tuple[int, int]:
        """Delete runs: their events, their derived rows, and the blobs that no other run names.

        A blob that was stored again after the run had named it is claimed by somebody who is about to name it
        too, and stays.

        Returns:
            How many events and how many blob files are gone.
        """
        gone = 0
        orphans: dict[str, datetime] = {}
        with self._write() as connection:
            lock(connection, *sorted(run_ids))
            for run_id in run_ids:
                named = self._named(connection, run_id)
                for table in (candidates, runs):
                    connection.execute(delete(table).where(table.c.run_id == run_id))
                gone += connection.execute(delete(events).where(events.c.run_id == run_id)).rowcount
                for sha256, time in named.items():
                    orphans[sha256] = max(time, orphans.get(sha256, time))
            for sha256 in list(orphans):
                names_it = or_(candidates.c.sha256 == sha256, candidates.c.latents == sha256)
                if connection.scalar(select(candidates.c.run_id).where(names_it).limit(1)) is not None:
                    del orphans[sha256]
        # Files go last: a log without its files would be broken, a file without a log is only litter.
        files = sum(
            self.blobs.remove(sha256, unless_claimed_after=t.timestamp()) for sha256, t in orphans.items()
        )
        return gone, files

    def rebuild(self) -> None:
        """Make the derived tables again from the events."""
        with self._write() as connection:
            migrate.rebuild(connection)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, connection: Connection, run_id: str) -> dict[str, datetime]:
        made = and_(
            events.c.run_id == candidates.c.run_id,
            events.c.round == candidates.c.round,
            events.c.index == candidates.c.index,
            events.c.type == "image_generated",
        )
        query = select(candidates.c.sha256, candidates.c.latents, events.c.time).join(events, made)
        named: dict[str, datetime] = {}
        for sha256, latents, time in connection.execute(query.where(candidates.c.run_id == run_id)):
            for address in filter(None, (sha256, latents)):
                named[address] = max(time, named.get(address, time))
        return named

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for queries over the tables of `schema`, for readers with questions of their own."""
        with store_errors(self._engine), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with store_errors(self._engine), self._writer.begin() as connection:
            yield connection


def open_store(settings: Settings, *, read_only: bool = False) -> TraceStore:
    """Open the log of `settings.home`, or of `settings.traces.database_url`.

    Args:
        settings: The resolved settings.
        read_only: Create and migrate nothing; works on a folder without write permission.

    Raises:
        UserError: The home cannot be written, there is no log to read, the database is unknown or newer than
            this emoloop, or no emoloop log at all.
    """
    home = settings.home.expanduser().absolute()
    return TraceStore(open_database(settings, home, read_only=read_only), BlobStore(home / "blobs"), home)
