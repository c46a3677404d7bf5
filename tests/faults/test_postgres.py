"""A PostgreSQL server that goes away under a run and comes back, and one of several that is not there."""

from __future__ import annotations

import threading

import pytest
from emoloop import EmotionTarget, open_loop
from emoloop.domain import RunStatus
from emoloop.evals.bench import postgres
from emoloop.events import RunStarted
from emoloop.graph.worker import Worker
from emoloop.settings import load_settings
from emoloop.traces import database
from emoloop.traces.database import StoreError
from emoloop.traces.store import open_store
from painter import Painter
from scripted import Scripted
from sqlalchemy import event, text

TARGET = EmotionTarget(valence=2, arousal=-1)
LOOP = {"rounds": 3, "images": 2, "patience": 3, "proposals": 1}


@pytest.fixture
def server():
    if why := postgres.missing():
        pytest.skip(why)
    with postgres.server() as made:
        yield made


def essence(result):
    return [[(it.prompt, it.seed, it.sha256, it.reward) for it in r.candidates] for r in result.rounds]


class Breaking(Painter):
    """Has something done before its third batch is painted, when nothing waits for the log."""

    def __init__(self, what):
        super().__init__()
        self._what, self._calls = what, 0

    async def generate(self, requests):
        self._calls += 1
        if self._calls == 3:
            self._what()
        return await super().generate(requests)


async def test_a_server_that_restarts_costs_time_alone(server, tmp_path):
    async with open_loop(generator=Painter(), lvlm=Scripted(), home=tmp_path / "calm", loop=LOOP) as loop:
        calm = await loop.run("a dog", TARGET, seed=7)
    starting = threading.Thread(target=server.start)

    def crash():
        server.stop()
        starting.start()

    traces = {"database_url": server.url}
    given = {"generator": Breaking(crash), "lvlm": Scripted(), "home": tmp_path / "home", "traces": traces}
    async with open_loop(**given, loop=LOOP) as loop:
        loop.recorder.store.queue.add(
            "run",
            {"mine": {"prompt": "a dog", "target": {"valence": 2, "arousal": -1}, "seed": 7, "options": {}}},
        )
        await Worker(loop, until_empty=True).work()
        starting.join()
        result = await loop.recorder.result("mine")
        events = await loop.recorder.events("mine")
        assert loop.recorder.store.queue.counts()["run"]["done"] == 1
    assert result.status is RunStatus.COMPLETED and essence(result) == essence(calm)
    assert len({event.key for event in events}) == len(events) == events[-1].seq + 1


async def test_a_server_that_stays_away_ends_the_work_in_one_line_and_nothing_is_lost(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(database, "AWAY_TIMEOUT", 0.3)
    traces = {"database_url": server.url}
    given = {"home": tmp_path, "traces": traces, "loop": LOOP}
    async with open_loop(generator=Breaking(server.stop), lvlm=Scripted(), **given) as loop:
        with pytest.raises(StoreError) as raised:
            await loop.run("a dog", TARGET, seed=7, run_id="mine")
    assert "\n" not in str(raised.value)
    server.start()
    async with open_loop(generator=Painter(), lvlm=Scripted(), **given) as loop:
        assert len(await loop.recorder.events("mine")) > 6
        assert (await loop.resume("mine")).status is RunStatus.COMPLETED


def test_of_several_servers_the_one_that_is_there_is_taken(server, tmp_path):
    folder = server.url.rpartition("=")[2]
    url = f"postgresql://tester@/postgres?host={tmp_path}/gone,{folder}&target_session_attrs=read-write"
    with open_store(load_settings({"home": tmp_path, "traces": {"database_url": url}})) as store:
        assert not list(store.runs())


def test_an_append_that_was_cut_is_repeated(server, tmp_path):
    settings = load_settings({"home": tmp_path, "traces": {"database_url": server.url}})
    with open_store(settings) as store, open_store(settings) as other:
        cuts = iter([True])

        @event.listens_for(store._engine, "before_cursor_execute")
        def cut(connection, cursor, statement, *_):
            if statement.startswith("INSERT INTO events") and next(cuts, False):
                own = {"own": connection.connection.dbapi_connection.info.backend_pid}
                with other.read() as reader:
                    assert reader.scalar(text("SELECT pg_terminate_backend(:own, 5000)"), own)

        [kept] = store.append(RunStarted(run_id="one", prompt="a dog", target=TARGET, seed=1))
        assert next(cuts, "cut") == "cut"
        assert kept.seq == 0 and other.events("one") == [kept]
