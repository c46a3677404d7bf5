"""The lease table: what is to be done, who does it, and until when others leave it alone.

One mechanism for everything that one process at a time may work on: a run that somebody drives, a run that waits for
a worker, a job of the service. Who holds an entry renews its lease; a lease that ran out, or whose owner is a process
of this machine that is no more, is anybody's. On PostgreSQL workers step over each other's rows (SKIP LOCKED); SQLite
has one writer at a time anyway. A scheduler, a broker or a second journal is not needed for that.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from uuid import uuid4

from sqlalchemy import Connection, Float, Row, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from .database import lock
from .schema import events, meta, queue

#: How an entry stands: queued → running → done, failed or back; what is queued or runs may be cancelled, and what
#: failed or was cancelled queued again. What was only claimed and never queued has no state.
State = Literal["queued", "running", "done", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)

ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

#: Seconds that a lease lasts without renewal, and between renewals.
LEASE, RENEW = 60.0, 20.0

#: So often an entry is taken; one that ended each of its workers does not end them all.
ATTEMPTS = 5

#: Seconds over which the rate of work is taken.
_WINDOW = 600.0


@dataclass(frozen=True)
class Item:
    """An entry.

    Attributes:
        id: A run's, or a job's.
        kind: `run`, or the kind of a job.
        state: How it stands.
        payload: What is to be done.
        attempts: How often it was taken.
        error: Why it failed.
        created: POSIX seconds.
        changed: The same, of the last change of state.
        expires: Until when somebody holds it; None for nobody.
    """

    id: str
    kind: str
    state: State
    payload: dict[str, Any]
    attempts: int
    error: str | None
    created: float
    changed: float
    expires: float | None

    @property
    def held(self) -> bool:
        """Whether somebody holds it now."""
        return self.expires is not None and self.expires > time.time()


class _now(FunctionElement[float]):
    """POSIX seconds by the database's clock: those of several machines differ, and one may jump."""

    type = Float()
    inherit_cache = True


@compiles(_now, "postgresql")
def _(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


@compiles(_now, "sqlite")
def _(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def owner_name() -> str:
    """A name for who holds leases: machine, process, and something of its own."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


#: Owners of this process that work no more, though the log could not be told: its disk was full.
let_go: set[str] = set()


def is_gone(owner: str) -> bool:
    """Whether an owner was a process of this machine that is no more, or let go."""
    if owner in let_go:
        return True
    host, _, rest = owner.rpartition(":")[0].rpartition(":")
    if host != socket.gethostname() or not rest.isdigit():
        return False
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Queue:
    """The table's operations, one transaction each; `TraceStore.queue`.

    Args:
        read: Opens a connection for reading.
        write: Opens a transaction for writing.
    """

    def __init__(
        self,
        read: Callable[[], AbstractContextManager[Connection]],
        write: Callable[[], AbstractContextManager[Connection]],
    ) -> None:
        self._read, self._write = read, write

    # ---- leases

    def claim(self, id: str, owner: str, seconds: float = LEASE) -> str | None:
        """Hold an entry whatever its state, or renew that.

        Args:
            id: The entry; it is made where there is none.
            owner: Who holds it; the same name renews.
            seconds: How long others leave it alone.

        Returns:
            None where it is the owner's now; else who holds it.
        """
        now = time.time()
        with self._write() as connection:
            lock(connection, id)
            held = select(queue.c.owner).where(queue.c.id == id, queue.c.expires > _now())
            other = connection.scalar(held)
            if other is not None and other != owner:
                return other
            lease: dict[str, Any] = {"owner": owner, "expires": _now() + seconds}
            if not connection.execute(update(queue).where(queue.c.id == id).values(lease)).rowcount:
                row = {"id": id, "kind": "run", "attempts": 0, "created": now, "changed": now}
                connection.execute(insert(queue).values(row | lease))
        return None

    def release(self, id: str, owner: str) -> None:
        """Hold it no longer; an entry that was never queued is gone with that."""
        mine = (queue.c.id == id, queue.c.owner == owner)
        with self._write() as connection:
            connection.execute(delete(queue).where(*mine, queue.c.state.is_(None)))
            connection.execute(update(queue).where(*mine).values(owner=None, expires=None))

    def held(self, kind: str = "run") -> dict[str, str]:
        """Who holds what now, by entry; without those that are no more."""
        query = select(queue.c.id, queue.c.owner).where(queue.c.kind == kind, queue.c.expires > _now())
        with self._read() as connection:
            return {id: owner for id, owner in connection.execute(query) if not is_gone(owner)}

    def renew(self, owner: str, seconds: float = LEASE) -> set[str]:
        """Renew all that an owner works on.

        Returns:
            What is still its own; anything else was cancelled, or taken over.
        """
        mine = (queue.c.owner == owner, queue.c.state == "running")
        values = {"expires": _now() + seconds}
        with self._write() as connection:
            return set(connection.scalars(update(queue).where(*mine).values(values).returning(queue.c.id)))

    # ---- queue

    def add(
        self,
        kind: str,
        entries: Mapping[str, Mapping[str, Any]],
        *,
        batch: str | None = None,
        needs: str | None = None,
    ) -> None:
        """Queue entries; one that is known is queued again with its new payload, unless somebody works on it.

        Args:
            kind: Of all of them.
            entries: Payloads by id.
            batch: What they belong to.
            needs: Only workers that have it take them.
        """
        now = time.time()
        rows = [
            {
                "id": id, "kind": kind, "state": "queued", "batch": batch, "needs": needs,
                "payload": json.dumps(payload), "attempts": 0, "created": now, "changed": now,
            }
            for id, payload in entries.items()
        ]  # fmt: skip
        if not rows:
            return
        with self._write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            statement = dialect.insert(queue)
            new = {name: statement.excluded[name] for name in rows[0] if name not in ("id", "created")}
            at_work = queue.c.state == "running"
            kept = {name: case((at_work, queue.c[name]), else_=new[name]) for name in ("state", "attempts")}
            values = new | kept | {"error": None}
            connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values), rows)

    def take(
        self,
        owner: str,
        *,
        kind: str = "run",
        id: str | None = None,
        batch: str | None = None,
        needs: str | None = None,
        seconds: float = LEASE,
    ) -> Item | None:
        """Take the first entry that nobody works on.

        Args:
            owner: Who takes it.
            kind: Of this kind,
            id: only this one,
            batch: only of this batch,
            needs: only such as need this, or nothing.
            seconds: How long others leave it alone.

        Returns:
            None where there is none, work is paused, or as many as may be are under way.
        """
        wanted = [
            queue.c.kind == kind,
            queue.c.state == "queued",
            or_(queue.c.expires.is_(None), queue.c.expires < _now()),
            or_(queue.c.needs.is_(None), queue.c.needs == needs),
        ]
        wanted += [column == value for column, value in ((queue.c.id, id), (queue.c.batch, batch)) if value]
        first = select(queue.c.number).where(*wanted).order_by(queue.c.number).limit(1)
        values: dict[str, Any] = {
            "state": "running",
            "owner": owner,
            "expires": _now() + seconds,
            "changed": time.time(),
            "error": None,
        }
        values["attempts"] = queue.c.attempts + 1
        with self._write() as connection:
            control = _control(connection)
            if control.paused:
                return None
            if control.limit is not None and kind == "run":
                lock(connection, "emoloop queue")
                count = select(func.count()).where(queue.c.kind == kind, queue.c.state == "running")
                if (connection.scalar(count) or 0) >= control.limit:
                    return None
            number = connection.scalar(first.with_for_update(skip_locked=True))
            if number is None:
                return None
            taken = update(queue).where(queue.c.number == number).values(values).returning(*_COLUMNS)
            return _item(connection.execute(taken).one())

    def settle(self, id: str, owner: str, state: State, error: str | None = None) -> bool:
        """Say how an entry ended, or give it back (`queued`), and hold it no longer.

        Returns:
            Whether it was still the owner's to say so.
        """
        values: dict[str, Any] = {"state": state, "error": error and error.replace("\0", "\ufffd")}
        values |= {"owner": None, "expires": None, "changed": time.time()}
        if state == "queued":
            values["attempts"] = queue.c.attempts - 1
        mine = (queue.c.id == id, queue.c.owner == owner)
        with self._write() as connection:
            running = queue.c.state == "running"
            if connection.execute(update(queue).where(*mine, running).values(values)).rowcount:
                return True
            connection.execute(update(queue).where(*mine).values(owner=None, expires=None))
            return False

    def give_back(self, owner: str) -> None:
        """Give back all that an owner still holds."""
        mine = (queue.c.owner == owner, queue.c.state == "running")
        values = {"state": "queued", "attempts": queue.c.attempts - 1, "changed": time.time()}
        with self._write() as connection:
            connection.execute(update(queue).where(*mine).values(values))
            connection.execute(update(queue).where(queue.c.owner == owner).values(owner=None, expires=None))

    def reap(self) -> None:
        """Queue again what dead workers held; what ended several of them has failed.

        A run that got on meanwhile did not end its worker: it shared it with one that did.
        """
        running = queue.c.state == "running"
        with self._read() as connection:
            owners = set(connection.scalars(select(queue.c.owner).where(running).distinct()))
            lost = or_(
                queue.c.expires < _now(), queue.c.owner.in_([it for it in owners if it and is_gone(it)])
            )
            if connection.scalar(select(queue.c.number).where(running, lost).limit(1)) is None:
                return
        columns = queue.c.number, queue.c.id, queue.c.attempts, queue.c.changed
        with self._write() as connection:
            query = select(*columns).where(running, lost).with_for_update(skip_locked=True)
            found = connection.execute(query).all()
            told = select(events.c.run_id, func.max(events.c.time)).group_by(events.c.run_id)
            told = told.where(events.c.run_id.in_([it.id for it in found]))
            latest = dict(connection.execute(told).tuples().all())
            for number, id, attempts, taken in found:
                attempts -= id in latest and latest[id].timestamp() > taken
                worn = attempts >= ATTEMPTS
                values: dict[str, Any] = {"state": "failed" if worn else "queued", "attempts": attempts}
                values |= {"owner": None, "expires": None, "changed": time.time()}
                values["error"] = f"its worker died {ATTEMPTS} times" if worn else None
                connection.execute(update(queue).where(queue.c.number == number).values(values))

    def cancel(self, ids: Sequence[str] = (), *, batch: str | None = None) -> int:
        """Cancel what is queued, and what runs: its worker sees that at the next renewal and stops.

        Args:
            ids: These,
            batch: or what of a batch has not begun.

        Returns:
            How many.
        """
        chosen = queue.c.id.in_(ids) if batch is None else queue.c.batch == batch
        states = ("queued", "running") if batch is None else ("queued",)
        return self._turn("cancelled", chosen, queue.c.state.in_(states))

    def requeue(self, ids: Sequence[str] | None = None, *, kind: str = "run") -> int:
        """Queue again what failed (all of a kind), or what failed or was cancelled (by id).

        Returns:
            How many.
        """
        if ids is None:
            return self._turn("queued", queue.c.kind == kind, queue.c.state == "failed")
        return self._turn("queued", queue.c.id.in_(ids), queue.c.state.in_(("failed", "cancelled")))

    def _turn(self, state: State, *where: Any) -> int:
        values: dict[str, Any] = {"state": state, "changed": time.time()}
        if state == "queued":
            values |= {"attempts": 0, "error": None}
        with self._write() as connection:
            return connection.execute(update(queue).where(*where).values(values)).rowcount

    # ---- looking and steering

    def items(
        self,
        ids: Iterable[str] | None = None,
        *,
        kinds: Sequence[str] = (),
        states: Sequence[State] = STATES,
        limit: int | None = None,
    ) -> list[Item]:
        """Entries by id, or of some kinds and states, the newest first, as many as `limit`."""
        query = (
            select(*_COLUMNS).where(queue.c.state.in_(states)).order_by(queue.c.number.desc()).limit(limit)
        )
        query = query.where(queue.c.id.in_(list(ids))) if ids is not None else query
        query = query.where(queue.c.kind.in_(kinds)) if kinds else query
        with self._read() as connection:
            return [_item(row) for row in connection.execute(query)]

    def counts(self) -> dict[str, dict[State, int]]:
        """How many entries stand how, by kind."""
        query = select(queue.c.kind, queue.c.state, func.count()).where(queue.c.state.is_not(None))
        found: dict[str, dict[State, int]] = {}
        with self._read() as connection:
            for kind, state, count in connection.execute(query.group_by(queue.c.kind, queue.c.state)):
                found.setdefault(kind, dict.fromkeys(STATES, 0))[state] = count
        return found

    def waiting(self, kind: str = "run") -> dict[str | None, int]:
        """How many entries are queued, by what they need."""
        query = select(queue.c.needs, func.count()).where(queue.c.kind == kind, queue.c.state == "queued")
        with self._read() as connection:
            return dict(connection.execute(query.group_by(queue.c.needs)).tuples().all())

    def rate(self, kind: str = "run") -> float:
        """Entries that ended, a second, over the last minutes; 0 where none did."""
        now = time.time()
        ended = (queue.c.kind == kind, queue.c.state.in_(("done", "failed")), queue.c.changed > now - _WINDOW)
        query = select(func.count(), func.min(queue.c.changed)).where(*ended)
        with self._read() as connection:
            count, first = connection.execute(query).one()
        return (count - 1) / (now - first) if count > 1 else 0.0

    def control(self) -> Control:
        """Whether work is paused, and how many runs may be under way."""
        with self._read() as connection:
            return _control(connection)

    def steer(self, control: Control) -> None:
        """Set that, for all workers at once."""
        with self._write() as connection:
            connection.execute(delete(meta).where(meta.c.key.in_(_CONTROL)))
            if control.paused:
                connection.execute(insert(meta).values(key=_PAUSED, value="1"))
            if control.limit is not None:
                connection.execute(insert(meta).values(key=_LIMIT, value=str(control.limit)))


@dataclass(frozen=True)
class Control:
    """What all workers heed: whether to take nothing, and how many runs may be under way among them."""

    paused: bool = False
    limit: int | None = None


_CONTROL = _PAUSED, _LIMIT = "queue_paused", "queue_limit"
_COLUMNS = [queue.c[name] for name in Item.__dataclass_fields__]


def _control(connection: Connection) -> Control:
    found = dict(
        connection.execute(select(meta.c.key, meta.c.value).where(meta.c.key.in_(_CONTROL))).tuples().all()
    )
    return Control(_PAUSED in found, int(found[_LIMIT]) if _LIMIT in found else None)


def _item(row: Row[Any]) -> Item:
    values = row._asdict()  # pyright: ignore[reportPrivateUsage]
    return Item(**values | {"payload": json.loads(values["payload"])})
