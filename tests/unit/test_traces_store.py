"""The log: what is acknowledged is there, once, in order, and the derived tables agree with it."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from emoloop.domain import Critique, EmotionTarget, Missing, RunStatus, StopReason, UserError
from emoloop.events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from emoloop.settings import Settings
from emoloop.traces.document import result_json
from emoloop.traces.fold import Fold, fold
from emoloop.traces.schema import Upsert, candidates, events, meta, runs
from emoloop.traces.store import RunFilter, TraceStore, open_store
from PIL import Image
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import psycopg

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path / "home")


@pytest.fixture
def store(settings):
    with open_store(settings) as store:
        yield store


def a_run(
    store: TraceStore,
    run_id: str,
    rewards: list[list[float | None]],
    prompt: str = "a dog by the sea",
    target: EmotionTarget | None = None,
    minutes: int = 0,
    finish: bool = True,
) -> list[Event]:
    """The events of a small run; a reward of None is a missing critique."""
    clock = START + timedelta(minutes=minutes)
    target = target or EmotionTarget(valence=2.0, arousal=-1.0)
    events: list[Event] = [RunStarted(run_id=run_id, time=clock, prompt=prompt, target=target, seed=7)]
    for number, row in enumerate(rewards):
        text = prompt if number == 0 else f"{prompt}, version {number}"
        if number:
            events.append(
                Rewritten(
                    run_id=run_id,
                    time=clock,
                    round=number,
                    prompt=text,
                    changes="more",
                    why="too little",
                    model="lvlm",
                    prompt_version="rewriter-1",
                    usage={"input_tokens": 3},
                    seconds=0.5,
                )
            )
        for index, reward in enumerate(row):
            clock += timedelta(seconds=1)
            colour = (sum(run_id.encode()) % 200, number, index)
            sha256 = store.blobs.put_image(Image.new("RGB", (8, 8), colour))
            place = {"run_id": run_id, "round": number, "index": index, "time": clock}
            events.append(
                ImageGenerated(
                    **place,
                    sha256=sha256,
                    prompt=text,
                    seed=2**64 - 1 - index,
                    model="tiny",
                    steps=2,
                    guidance=3.0,
                    height=8,
                    width=8,
                    seconds=0.25,
                )
            )
            reading = (
                Missing(reason="the critic timed out")
                if reward is None
                else Critique(analysis="calm", valence=1.5, arousal=-0.5, alignment=0.9, category="awe")
            )
            events.append(
                Critiqued(**place, sha256=sha256, critique=reading, model="lvlm", prompt_version="critic-1")
            )
            reason = "no critique" if reward is None else None
            events.append(
                Rewarded(**place, sha256=sha256, name="emotion", version="1", value=reward, reason=reason)
            )
    if finish:
        events.append(
            RunFinished(
                run_id=run_id, time=clock, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED
            )
        )
    return events


def seqs(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


def tables(store: TraceStore) -> dict[str, list[tuple]]:
    with store.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in (runs, candidates)
        }


def test_events_come_back_as_they_went_in(store):
    batch = a_run(store, "one", [[0.1, None], [0.5, 0.3]])
    assert seqs(store.append(*batch)) == list(range(len(batch)))
    kept = [event.model_copy(update={"seq": n, "cursor": n + 1}) for n, event in enumerate(batch)]
    assert store.events("one") == kept
    assert store.events("other") == []


def test_a_known_key_is_skipped_and_keeps_its_seq(store):
    batch = a_run(store, "one", [[0.1, 0.2]])
    first = store.append(*batch)
    again = [event.model_copy(update={"time": datetime.now(UTC)}) for event in batch]
    before = store.events("one"), tables(store)
    assert store.append(*again) == first
    assert (store.events("one"), tables(store)) == before
    twice = HumanFeedback(run_id="one", rating=1.0)
    assert seqs(store.append(twice, twice)) == [len(batch)] * 2


def test_every_rating_of_every_picture_is_kept(store):
    said = [
        HumanFeedback(run_id="one", sha256=sha, rating=rating)
        for sha, rating in (("a" * 64, 1.0), ("b" * 64, 1.0), ("a" * 64, 5.0), ("a" * 64, 1.0))
    ]
    assert seqs(store.append(*said)) == seqs(store.append(*said)) == [0, 1, 2, 3]
    numbered = [HumanFeedback(run_id="one", sha256="a" * 64, rating=1.0, index=n) for n in (0, 1, 1)]
    assert seqs(store.append(*numbered)) == [4, 5, 5]
    # A node that runs again says the same comment once.
    notes = [HumanFeedback(run_id="one", sha256=sha, comment="more sun") for sha in ("a" * 64, "a" * 64)]
    assert seqs(store.append(*notes)) == [6, 6]


def test_seq_is_dense_and_monotone_for_each_run_of_a_mixed_batch(store):
    one, two = a_run(store, "one", [[0.1]]), a_run(store, "two", [[0.2]])
    mixed = [event for pair in zip(one, two, strict=True) for event in pair]
    assert seqs(store.append(*mixed)) == [n for n in range(len(one)) for _ in range(2)]


def test_a_failing_batch_leaves_nothing(store, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(Fold, "run_row", fail)
    with pytest.raises(RuntimeError):
        store.append(*a_run(store, "one", [[0.1]]))
    monkeypatch.undo()
    assert store.events("one") == []
    again = store.append(*a_run(store, "one", [[0.1]]))
    assert len(again) == 5 and store.events("one") == again  # not taken for what the first try had written


def test_the_list_of_runs_says_how_each_went(store):
    store.append(*a_run(store, "one", [[0.1, None], [0.5, 0.3]]))
    (row,) = store.runs()
    assert (row.status, row.stop_reason) == (RunStatus.COMPLETED, StopReason.ROUNDS_USED)
    assert (row.rounds, row.images, row.missing) == (2, 4, 1)
    assert (row.best_round, row.best_index, row.best_reward) == (1, 0, 0.5)
    assert row.gain == pytest.approx(0.4 - 0.1)
    assert row.best_gain == pytest.approx(0.4)
    assert row.best_prompt == "a dog by the sea, version 1"
    assert row.target == EmotionTarget(valence=2.0, arousal=-1.0)
    assert row.started == START
    assert row.events == len(store.events("one"))


def test_a_missing_reward_is_never_zero(store):
    store.append(*a_run(store, "one", [[None, None]]))
    rows = list(store.candidates("one"))
    assert [row.reward for row in rows] == [None, None]
    assert rows[0].missing == "the critic timed out"
    (row,) = store.runs()
    assert (row.best_reward, row.gain, row.best_gain, row.missing) == (None, None, None, 2)


@pytest.mark.parametrize("table", ["candidates", "runs"])
def test_what_is_written_over_leaves_the_indexes_of_its_row_alone(store, table):
    upsert = getattr(store, f"_upsert_{table}")
    with store.read() as connection:
        program = connection.exec_driver_sql(f"EXPLAIN {upsert._sql}", (None,) * len(upsert._names)).all()
    steps = {row.opcode for row in program}
    assert "IdxInsert" in steps and "IdxDelete" not in steps


def test_a_missing_critique_gives_way_to_a_later_one_and_a_value_does_not(store):
    store.append(*a_run(store, "one", [[None]], finish=False))
    sha256 = next(store.candidates("one")).sha256
    later = {"run_id": "one", "round": 0, "index": 0, "sha256": sha256}
    reading = Critique(valence=1.0, arousal=1.0, alignment=1.0)
    for attempt, value in enumerate((0.7, 0.9)):
        store.append(
            Critiqued(**later, node=f"retry{attempt}", critique=reading, model="m", prompt_version="1"),
            Rewarded(**later, node=f"reward{attempt}", name="emotion", version="1", value=value),
        )
    (row,) = store.candidates("one")
    assert (row.reward, row.missing, row.valence) == (0.7, None, 1.0)
    assert store.run("one").best.reward == 0.7


def test_a_second_critic_only_says_how_sure_the_first_one_was(store):
    store.append(*a_run(store, "one", [[0.5]]))
    (before,) = store.candidates("one")
    reading = Critique(valence=-0.5, arousal=0.0, alignment=1.0)
    second = {"run_id": "one", "node": "second", "sha256": before.sha256, "model": "m", "prompt_version": "1"}
    store.append(Critiqued(**second, critique=reading))
    (after,) = store.candidates("one")
    assert before.spread is None and after == before.model_copy(update={"spread": 2.0})


def test_runs_can_be_picked_by_adapter(store):
    store.append(*a_run(store, "bare", [[0.1]]))
    adapted = a_run(store, "adapted", [[0.1]], minutes=1)
    store.append(
        *(e.model_copy(update={"adapter": "abc123"}) if isinstance(e, ImageGenerated) else e for e in adapted)
    )
    assert [row.run_id for row in store.runs(RunFilter(adapter="abc"))] == ["adapted"]
    assert [row.run_id for row in store.runs(RunFilter(adapter="none"))] == ["bare"]


def test_rebuilding_gives_the_same_tables(store):
    for name in ("one", "two"):
        batch = a_run(store, name, [[0.1, None, 0.4], [0.5, 0.3, None]])
        for start in range(0, len(batch), 3):
            store.append(*batch[start : start + 3])
    store.append(GenerationFailed(run_id="two", round=2, index=0, prompt="p", seed=1, reason="out of memory"))
    before = tables(store)
    with store._write() as connection:
        connection.execute(candidates.update().values(reward=9.0))
        connection.execute(runs.delete())
    store.rebuild()
    assert tables(store) == before


def test_filters(store):
    sad = EmotionTarget(category="sadness")
    store.append(*a_run(store, "aaa1", [[0.1], [0.5]]))
    store.append(*a_run(store, "aaa2", [[0.1], [0.2]], prompt="a CAT of 100% wool", target=sad, minutes=5))
    store.append(*a_run(store, "bbb3", [[0.3]], finish=False, minutes=10))

    def found(**conditions):
        return [row.run_id for row in store.runs(RunFilter(**conditions))]

    assert found() == ["bbb3", "aaa2", "aaa1"]
    assert found(limit=2) == ["bbb3", "aaa2"]
    assert found(status="running") == ["bbb3"]
    assert found(category="sadness") == ["aaa2"]
    assert found(valence=(-3, 0)) == ["aaa2"]
    assert found(arousal=(-1.1, 0), valence=(1, 3)) == ["bbb3", "aaa1"]
    assert found(min_gain=0.3) == ["aaa1"]
    assert found(prompt="cat") == ["aaa2"]
    assert found(prompt="100%") == ["aaa2"] and found(prompt="1_0%") == []
    assert found(since=START + timedelta(minutes=5)) == ["bbb3", "aaa2"]
    assert found(run_ids=("aaa1",)) == ["aaa1"]
    assert found(model="tiny") == ["bbb3", "aaa2", "aaa1"]
    assert {row.run_id for row in store.candidates(where=RunFilter(limit=2))} == {"aaa2", "bbb3"}
    said = {"run_id": "aaa1", "sha256": store.run("aaa1").best.sha256}
    store.append(HumanFeedback(**said, labels=["keep", "dim"]), HumanFeedback(run_id="bbb3", labels=["keep"]))
    store.append(HumanFeedback(**said, favourite=True), HumanFeedback(**said, labels=["dim"]))
    for _ in range(2):
        assert (found(label="keep"), found(label="dim"), found(label="♥")) == (["bbb3"], ["aaa1"], ["aaa1"])
        store.rebuild()
    store.append(HumanFeedback(**said, favourite=False))
    assert found(label="♥") == []
    assert found(min_gain=0.0) == ["bbb3", "aaa2", "aaa1"]
    with pytest.raises(ValueError):
        RunFilter(stauts="running")  # pyright: ignore[reportCallIssue]


def test_a_run_answers_to_its_beginning(store):
    for n, name in enumerate(("aaa1", "aaa2")):
        store.append(*a_run(store, name, [[0.1]], minutes=n))
    assert store.resolve("aaa1") == "aaa1"
    assert store.resolve("last") == "aaa2"
    with pytest.raises(UserError, match="may be any of"):
        store.resolve("aaa")
    with pytest.raises(UserError, match="no run 'c'"):
        store.resolve("c")


def test_a_run_is_rebuilt_from_its_events(store):
    store.append(*a_run(store, "one", [[0.1, None], [0.5, 0.3]]))
    result = store.run("one")
    assert (result.status, result.stop_reason) == (RunStatus.COMPLETED, StopReason.ROUNDS_USED)
    assert [len(round_.candidates) for round_ in result.rounds] == [2, 2]
    assert result.rounds[1].why == "too little"
    assert result.best is not None and (result.best.round, result.best.index) == (1, 0)
    assert result.best.image.size == (8, 8)
    assert isinstance(result.rounds[0].candidates[1].critique, Missing)
    (row,) = store.runs()
    assert (result.gain, result.best_gain) == (row.gain, row.best_gain)
    document = result_json(result)
    assert document["best"]["estimate"]["category"] == "awe"
    assert document["rounds"][0]["candidates"][1]["reward"] is None
    with pytest.raises(UserError):
        store.run("nothing")


def test_a_resumed_run_is_running_again_until_its_last_word(store):
    store.append(*a_run(store, "one", [[0.1]], finish=False))
    broken = {"run_id": "one", "status": RunStatus.INTERRUPTED, "stop_reason": StopReason.ERROR}
    store.append(RunFinished(**broken))
    assert store.runs()[0].status == store.run("one").status == RunStatus.INTERRUPTED
    more = a_run(store, "one", [[0.1], [0.4]])
    store.append(*more[:-1])
    assert store.runs()[0].status == store.run("one").status == RunStatus.RUNNING
    store.append(more[-1].model_copy(update={"index": 1}))
    assert store.runs()[0].status == store.run("one").status == RunStatus.COMPLETED
    before = tables(store)
    store.rebuild()
    assert tables(store) == before


def test_removing_a_run_leaves_what_others_share(store):
    shared = store.blobs.put_image(Image.new("RGB", (8, 8), "red"))

    def made(run_id, colour, round_):
        sha256 = store.blobs.put_image(Image.new("RGB", (8, 8), colour))
        return ImageGenerated(
            run_id=run_id,
            round=round_,
            sha256=sha256,
            prompt="p",
            seed=1,
            model="m",
            steps=1,
            guidance=1.0,
            height=8,
            width=8,
        )

    target = EmotionTarget(valence=1.0)
    store.append(RunStarted(run_id="one", prompt="p", target=target, seed=1))
    store.append(RunStarted(run_id="two", prompt="p", target=target, seed=1))
    own, common, claimed = made("one", "blue", 0), made("one", "red", 1), made("one", "green", 2)
    store.append(own, common, claimed)
    store.append(made("two", "red", 0))
    # Somebody stores the green picture and has not named it yet.
    store.blobs.put_image(Image.new("RGB", (8, 8), "green"))
    assert store.remove("one") == (4, 1)
    assert store.events("one") == [] and list(store.candidates("one")) == []
    assert [row.run_id for row in store.runs()] == ["two"]
    assert not store.blobs.path(own.sha256).exists()
    assert store.blobs.path(shared).exists() and store.blobs.path(claimed.sha256).exists()


def test_many_threads_and_runs_do_not_mix(store):
    names = [f"run{n:02}" for n in range(16)]
    batches = {name: a_run(store, name, [[0.1, 0.2], [0.3, 0.4]]) for name in names}
    gate = threading.Barrier(16)

    def write(name):
        gate.wait()
        return [seq for event in batches[name] for seq in seqs(store.append(event))]

    with ThreadPoolExecutor(16) as pool:
        written = list(pool.map(write, names))
    assert all(got == list(range(len(batches[name]))) for got, name in zip(written, names, strict=True))
    for name in names:
        assert [event.key for event in store.events(name)] == [event.key for event in batches[name]]


def test_threads_on_one_run_never_share_a_seq(store):
    notes = [HumanFeedback(run_id="one", index=n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        got = [seq for given in pool.map(store.append, notes) for seq in seqs(given)]
    assert sorted(got) == list(range(40))


def test_reading_needs_a_log_and_no_permission_to_write(settings, tmp_path):
    with pytest.raises(UserError, match="no traces in"):
        open_store(settings, read_only=True)
    assert not settings.home.exists()
    with open_store(settings) as store:
        store.append(*a_run(store, "one", [[0.1]]))
        with open_store(settings, read_only=True) as reader:
            assert [row.run_id for row in reader.runs()] == ["one"]
            with pytest.raises(Exception, match="readonly"):
                reader.append(HumanFeedback(run_id="one"))


def test_a_frozen_copy_can_be_read(settings, monkeypatch):
    with open_store(settings) as store:
        store.append(*a_run(store, "one", [[0.1]]))
    monkeypatch.setattr("os.access", lambda *_: False)
    with open_store(settings, read_only=True) as reader:
        assert len(reader.runs()) == 1
    assert {path.name for path in settings.home.iterdir()} == {"events.db", "blobs"}


def test_a_home_that_cannot_be_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        open_store(Settings(home=tmp_path / "file" / "home"))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    # What the permissions allow, the file system may still refuse.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot make the log's folder .*/home: Read-only .*EMOLOOP_HOME"):
        open_store(Settings(home=tmp_path / "home"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "needs a file"),
        ("oracle+nothing://x/y", "not supported"),
    ],
)
def test_a_bad_database_url_is_one_clear_line(tmp_path, url, says):
    with pytest.raises(UserError, match=says):
        open_store(Settings(home=tmp_path, traces={"database_url": url}))


def test_a_file_that_is_no_database_is_one_clear_line(settings):
    settings.home.mkdir()
    (settings.home / "events.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(UserError, match="not a database"):
        open_store(settings)


def test_the_database_can_lie_elsewhere(tmp_path):
    elsewhere = tmp_path / "deep" / "log.db"
    with open_store(
        Settings(home=tmp_path / "home", traces={"database_url": f"sqlite:///{elsewhere}"})
    ) as store:
        store.append(HumanFeedback(run_id="one"))
    assert elsewhere.is_file()


def test_no_comment_is_lost_with_or_without_a_picture(store):
    said = [
        HumanFeedback(run_id="one", round=0, sha256=sha, comment=comment)
        for sha in ("a" * 64, None)
        for comment in ("more sun", "less sun", "more sun")
    ]
    assert seqs(store.append(*said)) == [0, 1, 0, 2, 3, 2]
    assert [e.comment for e in store.events("one")] == ["more sun", "less sun"] * 2


@pytest.mark.parametrize("address", ["ab*", "../" * 20 + "etc/passwd", "A" * 64, "", "a" * 64 + "\n"])
def test_an_address_that_is_none_never_gets_into_the_log(address):
    with pytest.raises(ValueError, match="sha256"):
        HumanFeedback(run_id="one", sha256=address, comment="x")
    with pytest.raises(ValueError, match="sha256"):
        Rewarded(run_id="one", sha256=address, name="emotion", version="1", value=0.5)


def test_a_reader_follows_all_runs_in_the_order_of_commits(store):
    one, two = a_run(store, "one", [[0.1]]), a_run(store, "two", [[0.2]])
    written = [event for pair in zip(one, two, strict=True) for event in store.append(*pair)]
    assert store.tail() == written
    assert [event.cursor for event in written] == list(range(1, len(written) + 1))
    assert store.tail(3, limit=2) == written[3:5]
    store.remove("one")
    (more,) = store.append(HumanFeedback(run_id="two", comment="more sun"))
    assert more.cursor > written[-1].cursor and store.tail(written[-1].cursor) == [more]


def test_what_stood_is_given_back_and_not_what_came_later(store):
    (first,) = store.append(Rewritten(run_id="one", round=1, prompt="a", model="m", prompt_version="1"))
    (again,) = store.append(Rewritten(run_id="one", round=1, prompt="b", model="m", prompt_version="1"))
    assert again == first and again.prompt == "a"


def test_two_stores_on_one_log_see_each_other(settings, store):
    batch = a_run(store, "one", [[0.1, 0.2], [0.3, None]])
    with open_store(settings) as other:
        for number, event in enumerate(batch):
            (store, other)[number % 2].append(event)
        assert [event.seq for event in other.events("one")] == list(range(len(batch)))
    before = tables(store)
    store.rebuild()
    assert tables(store) == before


def test_a_group_of_callers_shares_one_commit_and_subscribers_hear_of_it_once(store):
    heard: list[Event] = []
    store.subscribers.append(heard.extend)
    one, two = a_run(store, "one", [[0.1]]), a_run(store, "two", [[0.2]])
    first, second = store.append_all([one, two])
    assert (seqs(first), seqs(second)) == (list(range(len(one))), list(range(len(two))))
    assert heard == [*first, *second]
    store.append(*one)
    assert heard == [*first, *second]


def test_rows_reach_postgresql_by_name_and_without_nul():
    written = []
    connection = SimpleNamespace(exec_driver_sql=lambda sql, rows: written.append((sql, rows)))
    upsert = Upsert(psycopg.dialect(), meta)
    upsert(connection, [{"key": "a\0b", "value": "me"}])  # pyright: ignore[reportArgumentType]
    [(sql, rows)] = written
    assert "ON CONFLICT (key) DO UPDATE SET value = excluded.value" in sql
    assert rows == [{"key": "a\ufffdb", "value": "me"}]


def test_a_fold_may_be_followed_event_by_event(store):
    batch = store.append(*a_run(store, "one", [[0.1, None], [0.5, 0.3]]))
    following = Fold("one")
    for number, event in enumerate(batch, start=1):
        following.apply(event)
        assert following.warnings() == Fold("one", batch[:number]).warnings()
        if number > 1:
            assert following.result() == fold(batch[:number])
            assert following.rounds() == following.result().rounds
    assert following.result(store.blobs.path, store.home) == store.run("one")
    with pytest.raises(ValueError, match="no beginning"):
        fold(batch[1:])


def test_a_damaged_event_leaves_the_others_readable(store):
    store.append(*a_run(store, "one", [[0.1], [0.5]]))
    with store._write() as connection:
        connection.execute(events.update().where(events.c.seq == 3).values(body='{"type": "rewarded"'))
    assert len(store.events("one")) == 8
    assert store.run("one").best is not None


def test_a_run_is_one_owners_at_a_time(store):
    assert store.queue.claim("one", "a", 60) is None
    assert store.queue.claim("one", "b", 60) == "a"
    assert store.queue.claim("one", "a", 60) is None
    store.queue.release("one", "b")
    assert store.queue.claim("one", "b", 60) == "a"
    store.queue.release("one", "a")
    assert store.queue.claim("one", "b", -1) is None
    assert store.queue.claim("one", "c", 60) is None  # b's time was over


def test_a_new_home_is_its_owners_alone(tmp_path):
    with open_store(Settings(home=tmp_path / "home")):
        assert (tmp_path / "home").stat().st_mode & 0o077 == 0
