"""The recorder: async, durable when it returns."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest
from emoloop.domain import EmotionTarget
from emoloop.events import HumanFeedback, RunStarted
from emoloop.settings import Settings
from emoloop.traces import recorder as module
from emoloop.traces.database import StoreError
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


async def test_pictures_that_come_together_are_stored_together(tmp_path, monkeypatch):
    async with open_recorder(Settings(home=tmp_path)) as recorder:
        blobs, calls = recorder.store.blobs, []
        put_many = blobs.put_many
        monkeypatch.setattr(
            blobs, "put_many", lambda pngs, kind: calls.append(len(pngs)) or put_many(pngs, kind)
        )
        small = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in range(10)]
        addresses = await asyncio.gather(*map(recorder.put_image, small))
        assert sorted(calls) == [2, 8] and len(set(addresses)) == 10
        for sha256 in addresses:
            assert await recorder.get_png(sha256) == blobs.get_bytes(sha256)
        await asyncio.gather(*(recorder.put_image(Image.new("RGB", (512, 512), (n, 0, 0))) for n in range(2)))
        assert sorted(calls) == [1, 1, 2, 8]  # large ones are encoded side by side


async def test_what_is_no_picture_concerns_its_own_run_alone(tmp_path):
    class Broken:
        width = height = 16

    async with open_recorder(Settings(home=tmp_path)) as recorder:
        good, bad = Image.new("RGB", (16, 16), "red"), Broken()
        stored = await asyncio.gather(*map(recorder.put_image, (good, bad)), return_exceptions=True)
        assert await recorder.get_image(stored[0]) and isinstance(stored[1], AttributeError)
        with pytest.raises(AttributeError):
            await recorder.put_image(None)


async def test_a_disk_that_refuses_is_told_to_each_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async with open_recorder(Settings(home=tmp_path)) as recorder:
        pictures = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            stored = await asyncio.gather(*map(recorder.put_image, pictures), return_exceptions=True)
        assert [it.errno for it in stored] == [errno.ENOSPC] * 3
        assert not [file for file in recorder.store.blobs.folder.rglob("*") if file.is_file()]
        with pytest.raises(FileNotFoundError):
            await recorder.get_png("0" * 64)
        assert await recorder.put_image(pictures[0])


def test_the_newest_pictures_are_kept_up_to_a_size(monkeypatch):
    monkeypatch.setattr(module, "_RECENT", 10)
    recent = module._Recent()
    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4)):
        recent.add(name, b"x" * size)
    assert [name for name in "abc" if recent.get(name)] == ["a", "c"]


async def test_after_the_end_no_picture_is_taken(tmp_path):
    recorder = open_recorder(Settings(home=tmp_path))
    await recorder.aclose()
    with pytest.raises(StoreError, match="closed"):
        await recorder.put_image(Image.new("RGB", (4, 4)))
