"""`emoloop queue`, and the words of `collect` and `worker` that need no models."""

from __future__ import annotations

import json

from emoloop.cli import app
from emoloop.settings import Settings
from emoloop.traces.store import open_store
from typer.testing import CliRunner


def queue(home, *words):
    done = CliRunner().invoke(app, ["queue", "--home", str(home), *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_queue_is_shown_and_steered(tmp_path):
    home = tmp_path / "home"
    assert "empty" in queue(home)
    with open_store(Settings(home=home)) as store:
        store.queue.add("run", {name: {} for name in "abcd"})
        for name in "abc":
            store.queue.take("me")
            store.queue.settle(name, "me", "failed" if name == "a" else "done", "no")
    document = json.loads(queue(home, "--json"))
    assert document["entries"] == {"run": {"queued": 1, "running": 0, "done": 2, "failed": 1, "cancelled": 0}}
    assert document["seconds_left"] is not None and not document["paused"] and document["limit"] is None
    assert document["failures"] == [{"id": "a", "error": "no"}] and "failed a: no" in queue(home)
    assert "paused" in queue(home, "--pause") and "at most 3" in queue(home, "--limit", "3")
    document = json.loads(queue(home, "--json", "--requeue-failed"))
    assert (document["paused"], document["limit"]) == (True, 3) and document["entries"]["run"]["queued"] == 2
    document = json.loads(queue(home, "--json", "--go-on", "--limit", "0"))
    assert (document["paused"], document["limit"]) == (False, None)
