"""Where the graph's states are saved: beside the log, in SQLite or on the same PostgreSQL server.

The log is the truth and is synced at every commit; a checkpoint that is lost costs a few reads of the log, so
it need not be.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from ..domain import UserError
from ..settings import Settings
from ..traces import database

logger = logging.getLogger(__name__)

#: Seconds that a writer waits for other processes.
_BUSY = 60.0

_TRY_LOCK = "SELECT pg_try_advisory_lock(hashtextextended('emoloop checkpoints', 0)) AS mine"
_UNLOCK = "SELECT pg_advisory_unlock(hashtextextended('emoloop checkpoints', 0))"


@asynccontextmanager
async def open_checkpointer(settings: Settings) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """The saver that belongs to the log of these settings.

    Raises:
        UserError: A PostgreSQL URL without the `postgres` extra.
    """
    url = settings.traces.database_url
    if url is not None and url.startswith("postgres"):
        async with _postgres(url) as saver:
            yield saver
        return
    path = settings.home.expanduser().absolute() / "checkpoints.db"
    saver = await asyncio.to_thread(_sqlite, path)
    try:
        yield saver
    finally:
        await asyncio.to_thread(saver.conn.close)


def _sqlite(path: Path) -> _SqliteSaver:
    _set_aside_if_damaged(path)
    saver = _SqliteSaver(sqlite3.connect(path, timeout=_BUSY, check_same_thread=False), serde=_serializer())
    saver.setup()
    saver.conn.execute("PRAGMA synchronous=NORMAL")
    return saver


class _SqliteSaver(SqliteSaver):
    """LangGraph's saver for plain and for async code alike; its own two serve one of them each."""

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(self, config: RunnableConfig | None, **wanted: Any) -> AsyncIterator[CheckpointTuple]:
        for found in await asyncio.to_thread(lambda: list(self.list(config, **wanted))):
            yield found

    async def aput(self, *args: Any, **kwargs: Any) -> RunnableConfig:
        return await asyncio.to_thread(self.put, *args, **kwargs)

    async def aput_writes(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.to_thread(self.put_writes, *args, **kwargs)

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id)


def _serializer() -> JsonPlusSerializer:
    # States are plain JSON, so nothing else is ever read: a crafted file must not make objects, let alone run code.
    return JsonPlusSerializer(pickle_fallback=False, allowed_json_modules=None, allowed_msgpack_modules=None)


def _set_aside_if_damaged(path: Path) -> None:
    """Rename a file that is no database: the log is the truth, and one damaged file must not close a home."""
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY)) as connection:
            connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{uuid4().hex[:8]}")
        path.replace(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        logger.warning("%s is damaged (%s): moved to %s; runs go on from the log", path, error, aside.name)


@asynccontextmanager
async def _postgres(url: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    try:
        savers, pools, rows = (
            import_module(name)
            for name in ("langgraph.checkpoint.postgres.aio", "psycopg_pool", "psycopg.rows")
        )
    except ImportError as error:
        raise UserError(f"PostgreSQL needs {error.name}: pip install 'emoloop[postgres]'") from error
    _, _, rest = url.partition("://")
    # A pool that checks its connections: a single one is lost while a model thinks for minutes.
    pool = pools.AsyncConnectionPool(
        f"postgresql://{rest}",
        min_size=1,
        max_size=4,
        open=False,
        timeout=database.AWAY_TIMEOUT,
        check=pools.AsyncConnectionPool.check_connection,
        kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": rows.dict_row},
    )
    async with pool:
        saver = savers.AsyncPostgresSaver(pool, serde=_serializer())
        async with pool.connection() as connection:
            # Workers that start together must not make the tables at the same time. To wait inside a statement would
            # hold up an index that is made concurrently.
            while not (await (await connection.execute(_TRY_LOCK)).fetchone())["mine"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await saver.setup()
            await connection.execute(_UNLOCK)
        yield saver
