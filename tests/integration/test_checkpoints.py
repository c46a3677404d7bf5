"""The savers that the loop opens, under LangGraph's own conformance suite, beside the savers they are made of."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import count

import pytest
from emoloop.graph.checkpoint import open_checkpointer
from emoloop.settings import Settings
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

conformance = pytest.importorskip("langgraph.checkpoint.conformance")


async def failed(open_saver):
    """For each capability that the saver has, the tests that fail."""

    @conformance.checkpointer_test(name="saver")
    async def saver():
        async with open_saver() as it:
            yield it

    report = await conformance.validate(saver)
    return {name: it.failures for name, it in report.results.items() if it.detected}


async def test_sqlite_passes_what_langgraphs_own_passes(tmp_path):
    numbers = count()

    @asynccontextmanager
    async def ours():
        home = tmp_path / f"home{next(numbers)}"
        home.mkdir()
        async with open_checkpointer(Settings(home=home)) as saver:
            yield saver

    def theirs():
        return AsyncSqliteSaver.from_conn_string(str(tmp_path / f"{next(numbers)}.db"))

    found = await failed(ours)
    assert len(found) >= 5 and found == await failed(theirs)


async def test_workers_that_start_together_make_the_tables_once(postgres, tmp_path):
    import psycopg

    settings = Settings(home=tmp_path, traces={"database_url": postgres})

    async def opened():
        async with open_checkpointer(settings):
            pass

    for _ in range(3):
        with psycopg.connect(postgres, autocommit=True) as connection:
            names = connection.execute(
                "SELECT tablename FROM pg_tables WHERE tablename LIKE 'checkpoint%'"
            ).fetchall()
            for [name] in names:
                connection.execute(f'DROP TABLE "{name}"')
        await asyncio.gather(*(opened() for _ in range(4)))


async def test_postgres_passes_what_langgraphs_own_passes(postgres, tmp_path):
    from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

    settings = Settings(home=tmp_path, traces={"database_url": postgres})
    found = await failed(lambda: open_checkpointer(settings))
    assert len(found) >= 5
    assert found == await failed(lambda: AsyncPostgresSaver.from_conn_string(postgres))
