"""The tables, for SQLite and PostgreSQL alike.

`events` is append-only and the truth. `runs`, `candidates` and `labels` are what `fold.Fold` makes of it, in a shape
that SQL can filter; they are written in the transaction of their events, so they never lag, and `TraceStore.rebuild`
makes them again. Event bodies are JSON text: the log has to give back exactly what it was handed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import TypeEngine

#: Version of the tables (events carry their own, `events.SCHEMA_VERSION`).
TABLES_VERSION = 5

#: The oldest whose tables are those of today, so that it can be read as it stands.
READABLE = 3


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, always aware; SQLite keeps no zone, so it is put back when read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Any aware datetime to UTC."""
        return value if value is None or value.tzinfo is UTC else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """What the database holds, with its zone."""
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class Seed(TypeDecorator[int]):
    """A seed as decimal text: torch takes 64 bits without a sign, which no integer column holds."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        """To text."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:
        """From text."""
        return None if value is None else int(value)


metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    # Grows with every commit and is never given twice, so that a reader may go on after the last one it saw.
    Column("cursor", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("run_id", String(128), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("node", String(128), nullable=False),
    Column("index", Integer, nullable=False),
    Column("type", String(64), nullable=False),
    Column("time", UtcDateTime, nullable=False),
    Column("body", Text, nullable=False),
    UniqueConstraint("run_id", "seq", name="events_seq"),
    UniqueConstraint("run_id", "round", "node", "index", name="events_idempotency"),
    sqlite_autoincrement=True,
)

#: What is to be done, who does it, and until when (POSIX seconds) others leave it alone; see `queue.Queue`.
queue = Table(
    "queue",
    metadata,
    # The order in which entries are taken.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("kind", String(32), nullable=False),
    # None: held by somebody, never queued.
    Column("state", String(16)),
    Column("batch", String(64)),
    Column("needs", String(64)),
    Column("payload", Text),
    Column("attempts", Integer, nullable=False),
    Column("error", Text),
    Column("owner", String(128)),
    Column("expires", Float),
    Column("created", Float, nullable=False),
    Column("changed", Float, nullable=False),
    Index("queue_state", "state", "kind", "number"),
    Index("queue_owner", "owner"),
    sqlite_autoincrement=True,
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("status", String(32), nullable=False),
    Column("stop_reason", String(32)),
    Column("started", UtcDateTime, nullable=False),
    Column("updated", UtcDateTime, nullable=False),
    Column("finished", UtcDateTime),
    Column("prompt", Text, nullable=False),
    Column("prompt_hash", String(64), nullable=False),
    Column("seed", Seed, nullable=False),
    # As asked for; a category alone leaves the numbers empty here and fills the point it stands for below.
    Column("valence", Float),
    Column("arousal", Float),
    Column("category", String(32)),
    Column("point_valence", Float),
    Column("point_arousal", Float),
    Column("model", Text),
    Column("adapter", Text),
    Column("events", Integer, nullable=False, default=0),
    Column("rounds", Integer, nullable=False, default=0),
    Column("images", Integer, nullable=False, default=0),
    Column("missing", Integer, nullable=False, default=0),
    Column("best_round", Integer),
    Column("best_index", Integer),
    Column("best_sha256", String(64)),
    Column("best_prompt", Text),
    Column("best_reward", Float),
    Column("gain", Float),
    Column("best_gain", Float),
    Index("runs_started", "started"),
)

candidates = Table(
    "candidates",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("prompt", Text),
    Column("prompt_hash", String(64)),
    Column("negative_prompt", Text),
    Column("seed", Seed),
    Column("sha256", String(64)),
    Column("latents", String(64)),
    Column("model", Text),
    Column("revision", Text),
    Column("adapter", Text),
    Column("steps", Integer),
    Column("guidance", Float),
    Column("height", Integer),
    Column("width", Integer),
    Column("valence", Float),
    Column("arousal", Float),
    Column("category", String(32)),
    Column("alignment", Float),
    # How far critics differ on this image: over one critic's samples, or between critics; the larger axis.
    Column("spread", Float),
    Column("reward", Float),
    Column("reward_name", Text),
    Column("reward_version", Text),
    Column("missing", Text),
    Index("candidates_sha256", "sha256"),
    Index("candidates_latents", "latents"),
    Index("candidates_prompt_hash", "prompt_hash"),
)


#: What people call a run (an empty `sha256`) and its pictures.
labels = Table(
    "labels",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("label", String(64), primary_key=True),
    Index("labels_label", "label"),
)


class Upsert:
    """Rows that are inserted, or written over those of their primary key.

    The statement is compiled once and handed to the driver as text: to have SQLAlchemy build and bind it anew costs
    several times what the database does.

    Args:
        dialect: Of the database.
        table: One of ours; the cursor of an event is the database's to give, so nothing is written over there.
        kept: Columns that a row keeps once it is there. SQLite writes an index wherever a statement sets its column,
            be it to the same value.
    """

    def __init__(self, dialect: Dialect, table: Table, kept: Collection[str] = ()) -> None:
        names = [column.name for column in table.columns if column.name != "cursor"]
        statement = (postgresql if dialect.name == "postgresql" else sqlite).insert(table).inline()
        keys = [column.name for column in table.primary_key]
        if set(keys) <= set(names):
            values = {name: statement.excluded[name] for name in names if name not in (*keys, *kept)}
            statement = statement.on_conflict_do_update(index_elements=keys, set_=values)
        compiled = statement.compile(dialect=dialect, column_keys=names)
        self._sql, self._positional = str(compiled), compiled.positiontup is not None
        self._names = compiled.positiontup or names
        self._columns = [(name, _bound(table.columns[name].type, dialect)) for name in self._names]

    def __call__(self, connection: Connection, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows; none at all is nothing to do."""
        given: list[Any] = []
        for row in rows:
            bound = [row[name] if bind is None else bind(row[name]) for name, bind in self._columns]
            given.append(tuple(bound) if self._positional else dict(zip(self._names, bound, strict=True)))
        if given:
            connection.exec_driver_sql(self._sql, given)


def _bound(kind: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """What makes a value of a column one for the driver."""
    if dialect.name == "postgresql" and isinstance(kind, String):
        # PostgreSQL refuses NUL in text; the event's JSON body has it escaped.
        return lambda value: value.replace("\0", "\ufffd") if isinstance(value, str) else value
    return kind.dialect_impl(dialect).bind_processor(dialect)
