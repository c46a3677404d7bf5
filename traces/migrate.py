"""From older logs to this version's, in steps; from newer ones not at all.

A step lifts the tables of one version to those of today, inside one transaction: where it changes the events, it makes
the derived tables again at its end. So only the events need care, and a step that fails leaves the log as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby

from sqlalchemy import Connection, MetaData, Table, insert, inspect, select, text

from ..domain import UserError
from ..events import EVENT, SCHEMA_VERSION, Event
from .fold import Fold
from .schema import TABLES_VERSION, Upsert, candidates, events, labels, meta, metadata, runs


def version(connection: Connection) -> int | None:
    """The version of the tables, None for an empty database; 0 is the log from before versions were kept."""
    names = inspect(connection).get_table_names()
    if "meta" in names:
        return int(connection.scalars(select(meta.c.value).where(meta.c.key == "tables_version")).one())
    return 0 if "events" in names else None


def migrate(connection: Connection) -> None:
    """Bring the database to `TABLES_VERSION`, in the caller's transaction.

    Raises:
        UserError: A newer emoloop wrote it.
    """
    found = version(connection)
    refuse_newer(found)
    if found == TABLES_VERSION:
        return
    if found is None:
        metadata.create_all(connection)
    else:
        _STEPS[found](connection)
        connection.execute(text("DROP TABLE IF EXISTS leases"))
    connection.execute(meta.delete().where(meta.c.key == "tables_version"))
    connection.execute(insert(meta).values(key="tables_version", value=str(TABLES_VERSION)))


def refuse_newer(found: int | None) -> None:
    """Raise UserError for a database that this version cannot know."""
    if found is not None and found > TABLES_VERSION:
        raise UserError(
            f"the trace log has version {found}, this emoloop knows up to {TABLES_VERSION}: "
            "upgrade emoloop, or choose another home"
        )


def rebuild(connection: Connection) -> None:
    """Make the derived tables again from the events."""
    for table in (candidates, runs, labels):
        connection.execute(table.delete())
    upsert_runs, upsert_candidates = (Upsert(connection.dialect, table) for table in (runs, candidates))
    run_ids = connection.scalars(select(events.c.run_id).distinct().order_by(events.c.run_id)).all()
    for run_id in run_ids:
        query = select(events.c.body).where(events.c.run_id == run_id).order_by(events.c.seq)
        whole = Fold(run_id, (EVENT.validate_json(body) for body in connection.scalars(query)))
        if row := whole.run_row():
            upsert_runs(connection, [row])
        upsert_candidates(connection, map(whole.candidate_row, whole.tried))
        whole.labels.write(connection, run_id)


def _from_0(connection: Connection) -> None:
    # Version 0 had `events (run_id, seq, body)` alone: no idempotency key, and bodies without a version.
    old = _set_aside(connection)
    query = select(old.c.run_id, old.c.seq, old.c.body).order_by(old.c.run_id, old.c.seq)
    seen: set[tuple[str, int, str, int]] = set()
    for run_id, seq, body in connection.execute(query).all():
        raw = json.loads(body) if isinstance(body, str) else body
        event = EVENT.validate_python({**raw, "run_id": run_id, "seq": seq, "schema_version": SCHEMA_VERSION})
        if event.key not in seen:
            seen.add(event.key)
            connection.execute(insert(events).values(row_of(event)))
    old.drop(connection)
    rebuild(connection)


def _from_1(connection: Connection) -> None:
    # Version 1 had no cursor: (run_id, seq) was the primary key. Runs overlapped, so the order is that of time.
    for table in (runs, candidates):
        table.drop(connection)
    old = _set_aside(connection)
    names = [column.name for column in events.columns if column.name != "cursor"]
    rows = select(*(old.c[name] for name in names)).order_by(old.c.time, old.c.run_id, old.c.seq)
    connection.execute(insert(events).from_select(names, rows))
    old.drop(connection)
    rebuild(connection)


def _from_2(connection: Connection) -> None:
    # Version 2 had `leases (run_id, owner, expires)`, good for a minute; `queue` holds them as well. Version 3 knew
    # no `persona_answered`, version 4 no labels: the favourites of before become rows.
    metadata.create_all(connection)
    query = select(events.c.run_id, events.c.body).where(events.c.type == "human_feedback")
    rows = connection.execute(query.order_by(events.c.run_id, events.c.seq)).all()
    for run_id, said in groupby(rows, key=lambda row: row.run_id):
        Fold(run_id, (EVENT.validate_json(row.body) for row in said)).labels.write(connection, run_id)


def _set_aside(connection: Connection) -> Table:
    """Rename the old `events` and make this version's tables."""
    connection.execute(text("ALTER TABLE events RENAME TO events_old"))
    old = Table("events_old", MetaData(), autoload_with=connection)
    if connection.dialect.name == "postgresql":
        # A renamed table keeps the names of its constraints, which are unique in the schema.
        for name in inspect(connection).get_unique_constraints("events_old"):
            connection.execute(text(f'ALTER TABLE events_old DROP CONSTRAINT "{name["name"]}"'))
        connection.execute(text("ALTER TABLE events_old DROP CONSTRAINT IF EXISTS events_pkey"))
    metadata.create_all(connection)
    return old


def row_of(event: Event) -> dict[str, object]:
    """An event as a row of `events`."""
    return {
        "run_id": event.run_id,
        "seq": event.seq,
        "round": event.round,
        "node": event.node,
        "index": event.index,
        "type": event.type,
        "time": event.time,
        "body": event.model_dump_json(exclude_none=True),
    }


#: From which version: what lifts its events to the tables of today.
_STEPS: dict[int, Callable[[Connection], None]] = {0: _from_0, 1: _from_1, 2: _from_2, 3: _from_2, 4: _from_2}
