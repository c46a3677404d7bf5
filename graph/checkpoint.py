"""Where the graph's states are saved: beside the log, in SQLite or on the same PostgreSQL server.

The log is the truth and is synced at every commit; a checkpoint that is lost costs a few reads of the log, so
it need not be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import aiosqlite
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ..domain import UserError
from ..settings import Settings

#: Seconds that a writer waits for other processes.
_BUSY = 60.0


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
    home = await asyncio.to_thread(lambda: settings.home.expanduser().absolute())
    path = home / "checkpoints.db"
    async with aiosqlite.connect(path, timeout=_BUSY) as connection:
        saver = AsyncSqliteSaver(connection)
        await saver.setup()
        await connection.execute("PRAGMA synchronous=NORMAL")
        yield saver


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
        check=pools.AsyncConnectionPool.check_connection,
        kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": rows.dict_row},
    )
    async with pool:
        saver = savers.AsyncPostgresSaver(pool)
        await saver.setup()
        yield saver
