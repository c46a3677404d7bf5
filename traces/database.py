"""How a database is opened: SQLite or PostgreSQL, made, brought up to date, or refused in one line.

On SQLite `synchronous=FULL`: NORMAL would survive a killed process as well, but after a power cut it may
forget the last commits, and an acknowledged event must not be forgotten. The price is one fsync per append,
small beside making an image. Writers take the lock at the start (`BEGIN IMMEDIATE`), so that many threads and
processes wait for each other rather than fail.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from tenacity import retry, retry_if_exception, retry_if_exception_type, stop_after_delay, wait_random

from ..domain import Failure, UserError, first_line
from ..files import check_writable
from ..settings import Settings
from . import migrate
from .schema import READABLE, TABLES_VERSION

#: Seconds that a writer waits for others before it gives up.
BUSY_TIMEOUT = 60.0

#: Seconds that a server may be away which was there before.
AWAY_TIMEOUT = 60.0

#: Execution option of an engine whose transactions write.
WRITES = "emoloop_writes"


class StoreError(Failure):
    """The log cannot be read or written: a full disk, a lost server, a damaged file."""


def open_database(settings: Settings, home: Path, *, read_only: bool) -> Engine:
    """Connect, and make the tables or bring them up to date.

    Args:
        settings: `traces.database_url` says where; None is `events.db` in `home`.
        home: The folder of the log.
        read_only: Create and migrate nothing.

    Raises:
        UserError: Nothing to read, not writable, not a database of ours, or a newer one.
    """
    url = _url(settings, home)
    local = url.get_backend_name() == "sqlite"
    if read_only:
        if local and not Path(str(url.database)).is_file():
            raise UserError(f"no traces in {home}: choose another home, or make a run first")
    else:
        for folder in {home, Path(str(url.database)).parent} if local else {home}:
            check_writable(folder, "the log's folder", "EMOLOOP_HOME chooses another home")
            # What a home holds is its owner's: prompts, pictures, comments.
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                # Permissions do not say everything: a file system may refuse even root.
                raise UserError(
                    f"cannot make the log's folder {folder}: {error.strerror} (EMOLOOP_HOME chooses another home)"
                ) from error
    engine = _sqlite(url, read_only) if local else _server(url)
    try:
        _prepare(engine, read_only)
    except SQLAlchemyError as error:
        engine.dispose()
        cause = (isinstance(error, DBAPIError) and error.orig) or error
        raise UserError(f"cannot open the trace log {url.render_as_string()}: {first_line(cause)}") from error
    except BaseException:
        engine.dispose()
        raise
    if not local:
        _wait_for_restarts(engine)
    return engine


def log_exists(settings: Settings) -> bool:
    """Whether there is a log already; a database server is only asked when it is opened."""
    url = _url(settings, settings.home)
    return url.get_backend_name() != "sqlite" or Path(str(url.database)).is_file()


def lock(connection: Connection, *names: str) -> None:
    """Hold names until the transaction ends; to be called with sorted names.

    SQLite has one writer at a time anyway; on PostgreSQL two writers of a run must not pick the same `seq`.
    """
    if connection.dialect.name == "postgresql":
        for name in names:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


@contextmanager
def store_errors(engine: Engine) -> Generator[None]:
    """Turn the driver's failures into a `StoreError` of one line."""
    try:
        yield
    except DBAPIError as error:
        raise StoreError(
            f"trace log {engine.url.render_as_string()}: {first_line(error.orig or error)}"
        ) from error


def _url(settings: Settings, home: Path) -> URL:
    if settings.traces.database_url is None:
        return URL.create("sqlite", database=str(home / "events.db"))
    try:
        url = make_url(settings.traces.database_url)
        url.get_backend_name()
    except ArgumentError:
        raise UserError(
            "setting traces.database_url is no database URL (postgresql://… or sqlite:///…)"
        ) from None
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UserError("setting traces.database_url: the log needs a file, sqlite:///path/to/events.db")
        return url.set(database=str(Path(url.database).expanduser().absolute()))
    # psycopg 3 is the driver of the `postgres` extra.
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _server(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True)
    except NoSuchModuleError:
        raise UserError(f"setting traces.database_url: {url.drivername} is not supported") from None
    except ModuleNotFoundError as error:
        raise UserError(f"{url.drivername} needs {error.name}: pip install 'emoloop[postgres]'") from error


def _wait_for_restarts(engine: Engine) -> None:
    """Have a new connection tried for some time: a server that restarts or fails over costs that time alone."""

    @event.listens_for(engine, "do_connect")
    @retry(
        retry=retry_if_exception_type(engine.dialect.loaded_dbapi.OperationalError),
        wait=wait_random(0.1, 0.5),
        stop=stop_after_delay(AWAY_TIMEOUT),
        reraise=True,
    )
    def connect(dialect: Dialect, _: object, words: Sequence[Any], options: Mapping[str, Any]) -> Any:
        return dialect.connect(*words, **options)


def _sqlite(url: URL, read_only: bool) -> Engine:
    path = Path(str(url.database))
    # Readers of a WAL database write beside it, except where nothing can change it and the WAL is empty.
    wal = path.with_name(f"{path.name}-wal")
    settled = not wal.is_file() or wal.stat().st_size == 0
    frozen = "&immutable=1" if settled and not os.access(path.parent, os.W_OK) else ""
    target = f"{path.as_uri()}?mode=ro{frozen}" if read_only else path.as_uri()

    def connect() -> sqlite3.Connection:
        # isolation_level None: transactions begin below, not where the driver sees the first write.
        connection = sqlite3.connect(
            target, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        if not read_only:
            # Rows are small and their indexes scattered, and a commit writes whole pages. A new file heeds it.
            connection.execute("PRAGMA page_size=512")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA wal_autocheckpoint=4000")
            connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = create_engine(url, creator=connect)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _locked(error: BaseException) -> bool:
    return isinstance(error, DBAPIError | sqlite3.OperationalError) and "locked" in str(error)


# Switching a new file to WAL takes a lock that the busy timeout does not cover.
@retry(
    retry=retry_if_exception(_locked),
    wait=wait_random(0.01, 0.1),
    stop=stop_after_delay(BUSY_TIMEOUT),
    reraise=True,
)
def _prepare(engine: Engine, read_only: bool) -> None:
    with engine.connect() as connection:
        found = migrate.version(connection)
    migrate.refuse_newer(found)
    if found == TABLES_VERSION or (read_only and found is not None and found >= READABLE):
        return
    if read_only:
        state = "is empty" if found is None else f"has the older version {found}"
        url = engine.url.render_as_string()
        raise UserError(f"the trace log {url} {state}: `emoloop traces rebuild` brings it up to date")
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        lock(connection, "emoloop migration")
        migrate.migrate(connection)
