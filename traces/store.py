"""The trace store: one database of events, one folder of blobs.

An append is one transaction and returns when it is durable (`database.py` says what that costs). Everything
here is synchronous and safe for many threads; `recorder.py` is the door for async code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, and_, bindparam, delete, or_, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from ..domain import RunResult, UserError
from ..events import EVENT, Event
from ..settings import Settings
from . import migrate
from .blobs import BlobStore, open_blobs
from .database import WRITES, StoreError, lock, open_database, store_errors
from .fold import Fold
from .queue import Queue
from .rows import CandidateRow, RunFilter, RunRow
from .schema import Upsert, candidates, events, labels, queue, runs

__all__ = ["CandidateRow", "RunFilter", "RunRow", "StoreError", "TraceStore", "open_store"]

logger = logging.getLogger(__name__)

#: Is called, in the thread that wrote, with the events that a commit added.
Subscriber = Callable[[Sequence[Event]], object]

_LOG = (
    select(events.c.seq, events.c.cursor, events.c.body)
    .where(events.c.run_id == bindparam("run_id"), events.c.cursor > bindparam("after", 0))
    .order_by(events.c.seq)
)

#: Runs whose state is kept in memory while they are written.
_FOLDS = 256


class TraceStore:
    """Events, derived tables and blobs. Safe for many threads; open one per process.

    Use `open_store`. All methods raise `StoreError` where the database fails.

    Attributes:
        subscribers: Are told of each commit, in the order of cursors.
        queue: Who works on what, and what waits for somebody.

    Args:
        engine: The database, at `TABLES_VERSION`.
        blobs: The files that the events name.
        home: The folder that holds both (a database by URL lies elsewhere).
    """

    def __init__(self, engine: Engine, blobs: BlobStore, home: Path) -> None:
        self.blobs = blobs
        self.home = home
        self._engine = engine
        self.subscribers: list[Subscriber] = []
        self._lock = threading.Lock()
        self._folds: dict[str, _Held] = {}
        self._insert = Upsert(engine.dialect, events)
        # A picture is made, or is not, by the first event of its key.
        self._upsert_candidates = Upsert(
            engine.dialect, candidates, kept=("sha256", "latents", "prompt_hash")
        )
        self._upsert_runs = Upsert(engine.dialect, runs, kept=("started",))
        self._writer = engine.execution_options(**{WRITES: True})
        self.queue = Queue(self.read, self._write)

    def append(self, *batch: Event) -> list[Event]:
        """Write events in one transaction; return when they are durable.

        Returns:
            The events as the log holds them, with `seq` and `cursor`, in the order given. Where an idempotency key
            was known, that is the first event of the key and not the one given.
        """
        return self.append_all([batch])[0] if batch else []

    def append_all(self, batches: Sequence[Sequence[Event]]) -> list[list[Event]]:
        """`append` for several callers in one transaction (a group commit)."""
        batch = [event for group in batches for event in group]
        with self._lock:
            stand, fresh = self._commit(batch)
            for subscriber in tuple(self.subscribers) if fresh else ():
                subscriber(fresh)
        found = iter(stand)
        return [[next(found) for _ in group] for group in batches]

    def _commit(self, batch: Sequence[Event], again: bool = True) -> tuple[list[Event], list[Event]]:
        try:
            with self._write() as connection:
                return self._append(connection, batch)
        except BaseException as error:
            # What was folded may not be in the log.
            self._folds.clear()
            cause = error.__cause__
            if not again or not (
                isinstance(cause, IntegrityError)
                or (isinstance(cause, DBAPIError) and cause.connection_invalidated)
            ):
                raise
        # Another process wrote to one of the runs as well: its events are read first. Or the server went away: what it
        # may have committed is found by its keys.
        return self._commit(batch, again=False)

    def _append(self, connection: Connection, batch: Sequence[Event]) -> tuple[list[Event], list[Event]]:
        # Cursors have to be given in the order of commits, so writers of other processes wait here.
        lock(connection, "emoloop append")
        stand: list[Event] = []
        fresh: list[Event] = []
        touched: dict[tuple[str, int, int], None] = {}
        for event in batch:
            held = self._hold(connection, event.run_id)
            known = held.known.get(event.key)
            if known is None:
                event = event.model_copy(update={"seq": held.next})
                held.next += 1
                held.known[event.key] = known = event
                held.fold.apply(event)
                fresh.append(event)
                if (event.round, event.index) in held.fold.tried:
                    touched[event.run_id, event.round, event.index] = None
            stand.append(known)
        if fresh:
            self._insert(connection, map(migrate.row_of, fresh))
            # Nobody else writes meanwhile, so that the numbers are consecutive.
            last = connection.exec_driver_sql("SELECT max(cursor) FROM events").scalar_one()
            first = last - len(fresh) + 1
            for cursor, event in enumerate(fresh, first):
                _set_cursor(event, cursor)
            rows = (self._folds[run_id].fold.candidate_row((n, index)) for run_id, n, index in touched)
            self._upsert_candidates(connection, rows)
            changed = dict.fromkeys(event.run_id for event in fresh)
            summaries = (self._folds[run_id].fold.run_row() for run_id in changed)
            self._upsert_runs(connection, filter(None, summaries))
            for run_id in {event.run_id for event in fresh if event.type == "human_feedback"}:
                self._folds[run_id].fold.labels.write(connection, run_id)
        while len(self._folds) > _FOLDS:
            del self._folds[next(iter(self._folds))]
        return stand, fresh

    def fold(self, run_id: str) -> Fold:
        """The state of a run as the log has it now; it grows with the events that this store appends."""
        with self._lock, self.read() as connection:
            self._folds.pop(run_id, None)  # another process may have written as well
            return self._hold(connection, run_id).fold

    def held(self, run_id: str) -> Fold | None:
        """As `fold`, without a look at the log: what this store knows of a run that it writes."""
        held = self._folds.get(run_id)
        return held.fold if held else None

    def _hold(self, connection: Connection, run_id: str) -> _Held:
        held = self._folds.pop(run_id, None)
        if held is None:
            rows = connection.execute(_LOG, {"run_id": run_id}).all()
            log = [event for _, cursor, body in rows if (event := _parse(cursor, body)) is not None]
            following = rows[-1].seq + 1 if rows else 0
            held = _Held(Fold(run_id, log), {event.key: event for event in log}, following)
        self._folds[run_id] = held  # the most recently used last
        return held

    def events(self, run_id: str, after: int = 0) -> list[Event]:
        """The run's events in order of `seq`, those after a cursor; empty for an unknown run."""
        with self.read() as connection:
            rows = connection.execute(_LOG, {"run_id": run_id, "after": after})
            return [event for _, cursor, body in rows if (event := _parse(cursor, body)) is not None]

    def tail(self, cursor: int = 0, limit: int = 1000) -> list[Event]:
        """Events of all runs in the order of their commits.

        Args:
            cursor: Only events after this one; 0 begins with the first.
            limit: At most so many.
        """
        query = select(events.c.cursor, events.c.body).where(events.c.cursor > cursor)
        with self.read() as connection:
            return [
                event
                for number, body in connection.execute(query.order_by(events.c.cursor).limit(limit))
                if (event := _parse(number, body)) is not None
            ]

    def run(self, run_id: str) -> RunResult:
        """A run as the loop returned it, or as far as it has come; candidates know where their images lie.

        Raises:
            UserError: There is no such run.
        """
        whole = Fold(run_id, self.events(run_id))
        if whole.started is None:
            raise UserError(f"no run {run_id!r} in {self.home} (see `emoloop traces list`)")
        return whole.result(self.blobs.path, self.home)

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
            query = select(runs.c.run_id).where(runs.c.run_id.startswith(name, autoescape=True))
            with self.read() as connection:
                # The exact id is the shortest that begins with itself.
                found = list(connection.scalars(query.order_by(runs.c.run_id).limit(5)))
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
        with self._lock, self._write() as connection:
            self._folds.clear()
            lock(connection, "emoloop append")
            for run_id in run_ids:
                named = self._named(connection, run_id)
                for table in (candidates, runs, labels):
                    connection.execute(delete(table).where(table.c.run_id == run_id))
                connection.execute(delete(queue).where(queue.c.id == run_id, queue.c.owner.is_(None)))
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
        with self._lock, self._write() as connection:
            lock(connection, "emoloop append")
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
        for sha256, latents, made_at in connection.execute(query.where(candidates.c.run_id == run_id)):
            for address in filter(None, (sha256, latents)):
                named[address] = max(made_at, named.get(address, made_at))
        return named

    @contextmanager
    def read(self) -> Generator[Connection]:
        """A connection for queries over the tables of `schema`, for readers with questions of their own."""
        with store_errors(self._engine), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Generator[Connection]:
        with store_errors(self._engine), self._writer.begin() as connection:
            yield connection


@dataclass
class _Held:
    """A run that is being written.

    Attributes:
        fold: Its state.
        known: Its events by idempotency key.
        next: The `seq` of its next event.
    """

    fold: Fold
    known: dict[tuple[str, int, str, int], Event]
    next: int


def _parse(cursor: int, body: str) -> Event | None:
    try:
        event = EVENT.validate_json(body)
    except ValidationError as error:
        # One damaged event must not take the others of its run along.
        logger.warning(
            "event %d of the log cannot be read and is left out: %s", cursor, error.errors()[0]["msg"]
        )
        return None
    _set_cursor(event, cursor)
    return event


def _set_cursor(event: Event, cursor: int) -> None:
    # Frozen for everybody else; a copy would cost more than reading the event.
    object.__setattr__(event, "cursor", cursor)


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
    return TraceStore(open_database(settings, home, read_only=read_only), open_blobs(settings, home), home)
