"""The recorder: async, durable when it returns."""

from __future__ import annotations

import asyncio

from emoloop.domain import EmotionTarget
from emoloop.events import HumanFeedback, RunStarted
from emoloop.settings import Settings
from emoloop.traces.recorder import open_recorder
from emoloop.traces.store import open_store
from PIL import Image


async def test_sixteen_runs_write_at_once(tmp_path):
    settings = Settings(home=tmp_path)

    async def run(recorder, name, colour):
        await recorder.record(RunStarted(run_id=name, prompt="p", target=EmotionTarget(valence=1.0), seed=1))
        for index in range(5):
            sha256 = await recorder.put_image(Image.new("RGB", (4, 4), (colour, index, 0)))
            await recorder.record(HumanFeedback(run_id=name, index=index, sha256=sha256))
        return [event.seq for event in await recorder.events(name)]

    async with open_recorder(settings) as recorder:
        seqs = await asyncio.gather(*(run(recorder, f"run{n}", n) for n in range(16)))
        sha256 = await recorder.put_image(Image.new("RGB", (4, 4), "red"))
        assert (await recorder.get_image(sha256)).getpixel((0, 0)) == (255, 0, 0)
    assert seqs == [list(range(6))] * 16
    with open_store(settings, read_only=True) as store:
        assert len(store.runs()) == 16


async def test_recording_nothing_and_closing_twice_are_fine(tmp_path):
    recorder = open_recorder(Settings(home=tmp_path))
    await recorder.record()
    await recorder.aclose()
    await recorder.aclose()


async def test_a_cancelled_record_is_whole_or_absent_and_can_be_repeated(tmp_path):
    async with open_recorder(Settings(home=tmp_path)) as recorder:
        batch = [HumanFeedback(run_id="one", index=n) for n in range(20)]
        task = asyncio.create_task(recorder.record(*batch))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await recorder.record(*batch)
        assert [event.seq for event in await recorder.events("one")] == list(range(20))
