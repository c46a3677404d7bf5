"""The lease table, on SQLite and PostgreSQL alike: transitions, takeover, who may take what, migration."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from emoloop.domain import EmotionTarget
from emoloop.events import RunStarted
from emoloop.settings import Settings
from emoloop.traces import queue as module
from emoloop.traces.queue import Control, owner_name
from emoloop.traces.schema import events, meta, metadata, queue, runs
from emoloop.traces.store import open_store
from sqlalchemy import text, update

#: A process that never was.
GONE = f"{module.socket.gethostname()}:999999999:x"


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    traces = {"database_url": request.getfixturevalue("postgres")} if request.param == "postgres" else {}
    with open_store(Settings(home=tmp_path / "home", traces=traces)) as store:
        yield store
        with store._write() as connection:
            for table in (queue, events, runs, meta):
                keep = table.c.key != "tables_version" if table is meta else text("1 = 1")
                connection.execute(table.delete().where(keep))


@pytest.fixture
def jobs(store):
    return store.queue


def state(jobs, name):
    [item] = jobs.items([name])
    return item.state


def test_entries_are_taken_in_order_and_end(jobs):
    jobs.add("run", {"b": {"prompt": "x\0"}, "a": {}})
    first = jobs.take("me")
    assert (first.id, first.state, first.payload, first.attempts) == ("b", "running", {"prompt": "x\0"}, 1)
    assert jobs.take("you").id == "a" and jobs.take("you") is None
    assert jobs.held() == {"b": "me", "a": "you"}
    assert not jobs.settle("b", "you", "done") and state(jobs, "b") == "running"
    assert jobs.settle("b", "me", "failed", "no\0") and not jobs.settle("b", "me", "done")
    [failed] = jobs.items(["b"])
    assert (failed.state, failed.error, failed.held) == ("failed", "no\ufffd", False)
    assert jobs.counts()["run"] == {"queued": 0, "running": 1, "done": 0, "failed": 1, "cancelled": 0}
    assert jobs.requeue() == 1 and jobs.take("me").attempts == 1
    assert jobs.requeue(["a"]) == 0  # it runs


def test_what_is_queued_twice_is_done_once(jobs):
    jobs.add("run", {"a": {"n": 1}, "b": {}}, batch="one")
    jobs.take("me")
    jobs.add("run", {"a": {"n": 2}, "b": {"n": 2}}, batch="two")
    assert state(jobs, "a") == "running"
    assert jobs.take("me", batch="one") is None
    assert jobs.take("me", batch="two").payload == {"n": 2}
    assert jobs.take("me") is None


def test_who_lacks_what_it_needs_takes_nothing(jobs):
    jobs.add("run", {"a": {}}, needs="models")
    jobs.add("distill", {"j": {}})
    assert jobs.take("me") is None and jobs.take("me", needs="others") is None
    assert jobs.take("me", needs="models").id == "a"
    assert jobs.take("me", kind="distill", id="k") is None
    assert jobs.take("me", kind="distill", id="j").id == "j"


def test_a_dead_workers_entry_is_taken_over_but_not_for_ever(jobs):
    jobs.add("run", {"a": {}, "b": {}, "c": {}})
    for number in range(module.ATTEMPTS):
        assert jobs.take(GONE).attempts == number + 1
        if not number:
            assert jobs.take("elsewhere:1:x", seconds=-1).id == "b"
            assert jobs.take("elsewhere:1:x").id == "c"
        jobs.reap()
    assert [state(jobs, name) for name in "abc"] == ["failed", "queued", "running"]
    assert "died" in jobs.items(["a"])[0].error


def test_a_run_that_gets_on_is_not_blamed_for_what_ends_its_workers(jobs, store):
    jobs.add("run", {"a": {}})
    target = EmotionTarget(valence=1.0)
    for number in range(2 * module.ATTEMPTS):
        assert jobs.take(GONE).id == "a"
        store.append(RunStarted(run_id="a", index=number, prompt="a dog", target=target, seed=1))
        jobs.reap()
    assert state(jobs, "a") == "queued"
    for _ in range(module.ATTEMPTS):
        assert jobs.take(GONE).id == "a"
        jobs.reap()
    assert state(jobs, "a") == "failed"


def test_renewal_tells_what_is_no_more_ones_own(jobs):
    jobs.add("run", {"a": {}, "b": {}})
    jobs.take("me", seconds=-1), jobs.take("me")
    assert jobs.cancel(["b"]) == 1
    assert jobs.renew("me") == {"a"}
    jobs.reap()
    assert state(jobs, "a") == "running"
    # What was cancelled is held until its worker has let go, and can be queued again meanwhile.
    assert jobs.requeue(["b"]) == 1 and jobs.take("you") is None
    assert not jobs.settle("b", "me", "failed", "stopped") and jobs.take("you").id == "b"


def test_what_is_given_back_was_not_tried(jobs):
    jobs.add("run", {"a": {}, "b": {}})
    jobs.take("me"), jobs.take("me")
    assert jobs.settle("a", "me", "queued")
    jobs.give_back("me")
    assert [it.attempts for it in jobs.items("ab")] == [0, 0] and not jobs.held()
    assert jobs.cancel(batch="none") == 0 and jobs.cancel(["a"]) == 1 and jobs.cancel(["a"]) == 0


def test_all_workers_heed_pause_and_limit(jobs):
    jobs.add("run", {"a": {}, "b": {}})
    jobs.steer(Control(paused=True))
    assert jobs.take("me") is None and jobs.control().paused
    jobs.steer(Control(limit=1))
    assert jobs.take("me").id == "a" and jobs.take("you") is None
    jobs.settle("a", "me", "done")
    assert jobs.take("you").id == "b"
    jobs.steer(Control())
    assert jobs.control() == Control()


def test_a_claim_is_no_entry_of_the_queue(jobs):
    assert jobs.claim("a", "me") is None and jobs.claim("a", "you") == "me"
    assert jobs.items() == [] and jobs.take("you") is None
    jobs.add("run", {"a": {}})
    assert jobs.take("you") is None  # somebody drives it
    jobs.release("a", "me")
    assert jobs.take("you").id == "a" and jobs.claim("a", "me") == "you"


def test_a_lease_goes_by_the_clock_of_the_database(jobs, monkeypatch):
    jobs.add("run", {"a": {}})
    assert jobs.take("me").id == "a" and jobs.claim("b", "me") is None
    now = time.time
    for jump in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        jobs.reap()
        assert jobs.claim("b", "you") == "me" and jobs.take("you") is None
        assert jobs.renew("me") == {"a"} and set(jobs.held()) == {"a", "b"}


def test_rate_counts_what_ended(jobs):
    assert jobs.rate() == 0
    jobs.add("run", {name: {} for name in "abc"})
    for name in "abc":
        jobs.take("me")
        jobs.settle(name, "me", "done")
    with jobs._write() as connection:
        connection.execute(update(queue).where(queue.c.id == "a").values(changed=time.time() - 100))
    assert jobs.rate() == pytest.approx(0.02, rel=0.05)


def test_many_takers_take_each_once(jobs):
    jobs.add("run", {str(number): {} for number in range(60)})

    def taker(number: int) -> list[str]:
        owner, found = owner_name(), []
        while item := jobs.take(owner):
            found.append(item.id)
            assert jobs.settle(item.id, owner, "done")
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [name for names in pool.map(taker, range(4)) for name in names]
    assert sorted(found) == sorted(map(str, range(60)))


def test_a_log_of_version_2_gets_the_table(store, tmp_path):
    event = RunStarted(run_id="one", prompt="a dog", target=EmotionTarget(valence=1.0), seed=1)
    store.append(event)
    with store._write() as connection:
        metadata.tables["queue"].drop(connection)
        connection.execute(text("CREATE TABLE leases (run_id VARCHAR(128) PRIMARY KEY)"))
        connection.execute(update(meta).where(meta.c.key == "tables_version").values(value="2"))
    url = str(store._engine.url) if "postgresql" in str(store._engine.url) else None
    with open_store(Settings(home=store.home, traces={"database_url": url})) as again:
        assert [it.run_id for it in again.runs()] == ["one"]
        assert again.queue.claim("one", "me") is None
