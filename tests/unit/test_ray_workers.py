"""How many actors there are follows the queue: up at once, down when nothing has waited for a while."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from emoloop.graph import ray_workers as module
from emoloop.graph.ray_workers import Actors
from emoloop.settings import load_settings
from emoloop.traces.store import open_store


class Stub:
    """An actor; its methods are called through `remote`."""

    def __init__(self):
        self.drained, self.ended, self.asked = 0, Future(), None
        self.work = self.drain = self

    def remote(self, *asked):
        if not asked:
            self.drained += 1
        else:
            self.asked = asked
        return self

    def future(self):
        return self.ended


async def test_actors_come_with_the_queue_and_go_when_none_wait(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = []

    def another():
        made.append(Stub())
        return made[-1]

    first = Stub()
    with open_store(load_settings({"home": str(tmp_path)})) as store:
        actors = Actors(first, another, store, 3, 4, needs="models", batch="mine", on_done=print)
        await actors._scale()
        assert first.asked == ("mine", "models") and not made  # one, though nothing waits
        store.queue.add("run", {f"run-{n}": {} for n in range(9)})
        await actors._scale()
        assert len(made) == 2  # four runs each
        store.queue.add("run", {f"more-{n}": {} for n in range(90)})
        await actors._scale()
        assert len(made) == 2  # as many as there may be
        store.queue.cancel([f"more-{n}" for n in range(90)] + [f"run-{n}" for n in range(8)])
        await actors._scale()
        assert not made[1].drained  # the next line may be near
        clock[0] += module._SPARE + 1
        await actors._scale()
        assert (first.drained, made[0].drained) == (0, 0) and made[1].drained
        made[1].ended.set_result(None)
        await asyncio.sleep(0)
        actors._forget_ended()
        assert len(actors._work) == 2
