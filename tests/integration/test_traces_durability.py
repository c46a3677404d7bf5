"""Killed writers, crowds of processes, a server database, old logs: what the store promises, for real."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emoloop.domain import Critique, Draft, EmotionTarget, RunStatus, StopReason, UserError
from emoloop.events import (
    Critiqued,
    HumanFeedback,
    ImageGenerated,
    PersonaAnswered,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from emoloop.settings import Settings
from emoloop.traces.store import RunFilter, StoreError, open_store
from PIL import Image

DATA = Path(__file__).parents[1] / "data"

WRITER = """
import sys
from PIL import Image
from emoloop.domain import EmotionTarget
from emoloop.events import ImageGenerated, RunStarted
from emoloop.settings import Settings
from emoloop.traces.store import open_store

home, run_id, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open_store(Settings(home=home)) as store:
    store.append(RunStarted(run_id=run_id, prompt="p", target=EmotionTarget(valence=1.0), seed=1))
    print("ready", flush=True)
    for index in range(count):
        sha256 = store.blobs.put_image(Image.new("RGB", (16, 16), (index % 256, index // 256, 0)))
        made = dict(prompt="p", seed=index, model="m", steps=1, guidance=1.0, height=16, width=16)
        (event,) = store.append(ImageGenerated(run_id=run_id, index=index, sha256=sha256, **made))
        print(event.seq, sha256, flush=True)
"""


def writer(home, run_id, count=100_000):
    command = [sys.executable, "-c", WRITER, str(home), run_id, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_loses_nothing_it_was_told_is_safe(tmp_path, seed):
    acknowledged = []
    with writer(tmp_path, "one") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(random.Random(seed).randint(1, 40)):
            acknowledged.append(process.stdout.readline().split())
        process.send_signal(signal.SIGKILL)
        # What was acknowledged before the signal arrived is still in the pipe; the last line may be cut.
        acknowledged += [
            line.split() for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n"
        ]
    with open_store(Settings(home=tmp_path), read_only=True) as reader:
        assert len(reader.events("one")) > len(acknowledged)
    with open_store(Settings(home=tmp_path)) as store:
        written = {event.seq: event for event in store.events("one")}
        assert sorted(written) == list(range(len(written)))
        for seq, sha256 in acknowledged:
            event = written[int(seq)]
            assert isinstance(event, ImageGenerated) and event.sha256 == sha256
        for event in written.values():
            if isinstance(event, ImageGenerated):
                assert store.blobs.get_image(event.sha256).size == (16, 16)
        (row,) = store.runs()
        assert row.images == len(written) - 1
        before = list(store.candidates("one"))
        store.rebuild()
        assert list(store.candidates("one")) == before


def test_processes_share_one_new_file(tmp_path):
    crowd = [writer(tmp_path, name, 25) for name in ("one", "two", "three", "shared", "shared")]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 5
    assert all(len(lines) == 26 for lines in outputs)
    with open_store(Settings(home=tmp_path), read_only=True) as store:
        for name in ("one", "two", "three", "shared"):
            events = store.events(name)
            assert [event.seq for event in events] == list(range(26))
            assert len({event.key for event in events}) == 26
        # Equal pixels of four runs lie there once, and no half-written file is left.
        assert len([path for path in store.blobs.folder.rglob("*") if path.is_file()]) == 25


def test_a_full_database_is_one_clear_line_and_loses_nothing(tmp_path):
    with open_store(Settings(home=tmp_path)) as store:
        store.append(HumanFeedback(run_id="one", index=0))
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(StoreError, match="database or disk is full"):
            store.append(HumanFeedback(run_id="one", index=1, comment="x" * 100_000))
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        assert store.append(HumanFeedback(run_id="one", index=1))[0].seq == 1
        assert len(store.events("one")) == 2


@pytest.fixture
def version_0(tmp_path):
    """The home of a log as it was before versions: events alone, no key, no version in the bodies."""
    target = EmotionTarget(category="awe")
    reading = Critique(valence=1.0, arousal=1.0, alignment=1.0)
    made = {"prompt": "p", "seed": 2**63, "model": "m", "steps": 1, "guidance": 1.0, "height": 8, "width": 8}
    events = [
        RunStarted(run_id="old", prompt="p", target=target, seed=1),
        ImageGenerated(run_id="old", sha256="a" * 64, **made),
        ImageGenerated(run_id="old", sha256="a" * 64, **made),
        Critiqued(run_id="old", sha256="a" * 64, critique=reading, model="m", prompt_version="1"),
        Rewarded(run_id="old", sha256="a" * 64, name="emotion", version="1", value=0.5),
        RunFinished(run_id="old", status=RunStatus.COMPLETED, stop_reason=StopReason.TARGET_REACHED),
    ]
    database = sqlite3.connect(tmp_path / "events.db")
    with database:
        database.execute(
            "CREATE TABLE events (run_id TEXT, seq INTEGER, body TEXT, PRIMARY KEY (run_id, seq))"
        )
        for seq, event in enumerate(events):
            body = json.dumps(event.model_dump(mode="json", exclude={"run_id", "seq", "schema_version"}))
            database.execute("INSERT INTO events VALUES (?, ?, ?)", ("old", seq, body))
    database.close()
    return tmp_path


def test_an_old_log_is_brought_up_to_date(version_0):
    settings = Settings(home=version_0)
    with pytest.raises(UserError, match="older version 0"):
        open_store(settings, read_only=True)
    with open_store(settings) as store:
        # The second picture of the same place is the repetition that the key now keeps out.
        assert [event.seq for event in store.events("old")] == [0, 1, 3, 4, 5]
        (row,) = store.runs(RunFilter(category="awe"))
        assert (row.best_reward, row.images, row.status) == (0.5, 1, RunStatus.COMPLETED)
        assert store.run("old").best is not None
        assert store.append(HumanFeedback(run_id="old"))[0].seq == 6
    with open_store(settings) as store:
        assert len(store.events("old")) == 6


def _known(now, before):
    """What a document says now, without the keys that it did not have before."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {key: _known(value, before[key]) for key, value in now.items() if key in before}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [_known(*pair) for pair in zip(now, before, strict=True)]
    return now


def test_a_log_of_version_1_gives_the_same_results(tmp_path):
    """The log and the document were written by version 1: a run that is complete, lacks readings, failed, waits."""
    shutil.copy(DATA / "log-version-1.db", tmp_path / "events.db")
    expected = json.loads((DATA / "log-version-1.json").read_text())
    settings = Settings(home=tmp_path)
    with pytest.raises(UserError, match="older version 1"):
        open_store(settings, read_only=True)
    with open_store(settings) as store:
        found = {
            row.run_id: {
                "row": row.model_dump(mode="json"),
                "candidates": [it.model_dump(mode="json") for it in store.candidates(row.run_id)],
                "result": store.run(row.run_id).model_dump(mode="json", exclude={"home"}),
                "events": len(store.events(row.run_id)),
            }
            for row in store.runs()
        }
        now = json.loads(json.dumps(found).replace(str(tmp_path), "HOME"))
        assert _known(now, expected) == expected
        told = store.tail(0, 1000)
        assert [event.cursor for event in told] == list(range(1, len(told) + 1))
        assert [event.time for event in told] == sorted(event.time for event in told)
        assert store.append(HumanFeedback(run_id="waiting"))[0].cursor == len(told) + 1
    with open_store(settings, read_only=True) as store:
        assert len(store.events("waiting")) == expected["waiting"]["events"] + 1


def test_a_log_of_version_3_is_read_as_it_stands_and_lifted_when_it_grows(tmp_path):
    settings = Settings(home=tmp_path)
    with open_store(settings) as store:
        store.append(
            RunStarted(run_id="one", prompt="p", target=EmotionTarget(category="awe"), seed=1),
            HumanFeedback(run_id="one", sha256="a" * 64, favourite=True),
        )
    database = sqlite3.connect(tmp_path / "events.db")
    with database:
        database.execute("UPDATE meta SET value = '3'")
        database.execute("DROP TABLE labels")
    with open_store(settings, read_only=True) as store:
        assert store.run("one").prompt == "p"
    draft = Draft(persona="monk", said={"emotion": "awe"}, prompt="p in fog")
    with open_store(settings) as store:
        store.append(
            PersonaAnswered(run_id="one", round=1, draft=draft, model="m", prompt_version="persona@1")
        )
        store.append(
            Rewritten(run_id="one", round=1, prompt="p in fog", model="m", prompt_version="mc_agent")
        )
        assert store.run("one").rounds[1].drafts == [draft]
        # The favourites of before are found as such.
        assert [row.run_id for row in store.runs(RunFilter(label="♥"))] == ["one"]
    assert database.execute("SELECT value FROM meta").fetchone() == ("5",)
    database.close()


def test_a_broken_old_log_stays_as_it_was(version_0):
    database = sqlite3.connect(version_0 / "events.db")
    with database:
        database.execute('UPDATE events SET body = \'{"type": "nothing"}\' WHERE seq = 4')
    with pytest.raises(ValueError):
        open_store(Settings(home=version_0))
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {"events"}
    assert database.execute("SELECT count(*) FROM events").fetchone() == (6,)
    database.close()


def test_a_newer_log_is_refused(tmp_path):
    settings = Settings(home=tmp_path)
    open_store(settings).close()
    database = sqlite3.connect(tmp_path / "events.db")
    with database:
        database.execute("UPDATE meta SET value = '99'")
    database.close()
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"version 99.*upgrade emoloop"):
            open_store(settings, read_only=read_only)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_home_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        open_store(Settings(home=tmp_path / "home"))


def test_postgres_keeps_the_same_promises(postgres, tmp_path):
    settings = Settings(home=tmp_path, traces={"database_url": postgres})
    with open_store(settings) as store, open_store(settings) as other:
        sha256 = store.blobs.put_image(Image.new("RGB", (8, 8), "red"))
        made = {"prompt": "p\0q", "model": "m", "steps": 1, "guidance": 1.0, "height": 8, "width": 8}
        target = EmotionTarget(valence=1.0, arousal=-1.0)
        batch = [
            RunStarted(run_id="one", prompt="p\0q", target=target, seed=2**64 - 1),
            ImageGenerated(run_id="one", sha256=sha256, seed=2**64 - 1, **made),
            Critiqued(
                run_id="one",
                sha256=sha256,
                critique=Critique(valence=1.0, arousal=1.0, alignment=1.0),
                model="m",
                prompt_version="1",
            ),
            Rewarded(run_id="one", sha256=sha256, name="emotion", version="1", value=0.5),
        ]
        assert store.append(*batch) == other.append(*batch)
        assert other.events("one")[1].key == batch[1].key
        (row,) = other.runs(RunFilter(valence=(0.5, 1.5), prompt="P", limit=3))
        assert (row.best_reward, row.seed, row.started) == (0.5, 2**64 - 1, batch[0].time)
        notes = [HumanFeedback(run_id="one", index=n) for n in range(60)]
        with ThreadPoolExecutor(8) as pool:
            kept = list(pool.map(lambda it: (store, other)[it.index % 2].append(it), notes))
        assert sorted(event.seq for events in kept for event in events) == list(range(4, 64))
        before = store.runs(), list(store.candidates("one"))
        store.rebuild()
        assert (store.runs(), list(store.candidates("one"))) == before
        assert store.run("one").best is not None
        assert store.remove("one") == (64, 1)
        assert store.runs() == []


def test_a_server_that_is_away_is_one_clear_line(tmp_path):
    pytest.importorskip("psycopg")
    url = f"postgresql://tester@/postgres?host={tmp_path}"
    with pytest.raises(UserError, match="cannot open the trace log"):
        open_store(Settings(home=tmp_path, traces={"database_url": url}))
