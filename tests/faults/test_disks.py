"""Disks that are full, slow, or lose what they were given, and clocks that jump, under a whole run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from emoloop import EmotionTarget, open_loop
from emoloop.domain import RunStatus
from painter import Painter
from scripted import Scripted

TARGET = EmotionTarget(valence=2, arousal=-1)


def make(home, painter=None, **options):
    loop = {"rounds": 3, "images": 3, "patience": 3, "proposals": 1, **options}
    return open_loop(generator=painter or Painter(), lvlm=Scripted(), home=home, loop=loop)


class Filling(Painter):
    """Has the disk filled when it has painted its fifth picture, in round 1: it finds no room."""

    def __init__(self, fill):
        super().__init__()
        self._fill, self._calls = fill, 0

    async def generate(self, requests):
        made = await super().generate(requests)
        self._calls += 1
        if self._calls == 5:
            self._fill()
        return made


def damage(path: Path):
    path.write_bytes(path.read_bytes()[:-3] + b"bad")


def essence(result):
    return [[(it.prompt, it.seed, it.sha256, it.reward) for it in r.candidates] for r in result.rounds]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB in memory; skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("what", ["event", "picture"])
async def test_a_disk_that_fills_up_loses_nothing_and_the_run_goes_on_once_there_is_room(
    small_disk, tmp_path, what
):
    async with make(tmp_path / "calm") as loop:
        calm = await loop.run("a dog", TARGET, seed=7)
    ballast, events = small_disk / "ballast", []

    def fill():
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()

    def note(event):
        events.append(event)
        if what == "event" and len(events) == 6:
            fill()

    async with make(small_disk / "home", Filling(fill) if what == "picture" else None) as loop:
        with contextlib.suppress(Exception):
            await loop.run("a dog", TARGET, seed=7, run_id="mine", on_event=note)
    ballast.unlink()
    torn = [file for file in (small_disk / "home" / "blobs").rglob(".*") if file.is_file()]
    assert torn == []
    async with make(small_disk / "home") as loop:
        kept = await loop.recorder.events("mine")
        assert kept[: len(events)] == events[: len(kept)] and len(kept) >= 6
        result = await loop.resume("mine")
    assert result.status is RunStatus.COMPLETED and essence(result) == essence(calm)
    assert all(it.image for r in result.rounds for it in r.candidates)


async def test_a_slow_disk_holds_up_nobody_else(tmp_path, monkeypatch):
    sync, waits, late = os.fsync, [], 0.0

    def slow(handle):
        waits.append(threading.current_thread())
        time.sleep(0.05)
        sync(handle)

    async def tick():
        nonlocal late
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            late += time.perf_counter() - began > 0.045

    async with make(tmp_path, rounds=1) as loop:
        await loop.run("a cat", TARGET, seed=1)
        monkeypatch.setattr(os, "fsync", slow)
        ticking = asyncio.create_task(tick())
        result = await loop.run("a dog", TARGET, seed=7)
        ticking.cancel()
    # A blocked event loop would be late once for each wait.
    assert result.status is RunStatus.COMPLETED and len(waits) >= 6 and late < len(waits) / 2
    assert threading.current_thread() not in waits


async def test_a_clock_that_jumps_changes_neither_order_nor_outcome(tmp_path, monkeypatch):
    async with make(tmp_path / "calm") as loop:
        calm = await loop.run("a dog", TARGET, seed=7)
    now, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now() + (86_400 if next(jumps) % 2 else -86_400))
    async with make(tmp_path / "home") as loop:
        result = await loop.run("a dog", TARGET, seed=7, run_id="mine")
        events = await loop.recorder.events("mine")
    assert essence(result) == essence(calm)
    assert [event.seq for event in events] == list(range(len(events)))


async def test_a_picture_that_was_damaged_while_the_run_stood_still_is_made_again(tmp_path):
    async with make(tmp_path, rounds=2) as loop:
        messages = loop.stream("a dog", TARGET, seed=7, run_id="mine")
        async for event in messages:
            if event.type == "image_generated":
                break
        await messages.aclose()
        [first, *_] = [e for e in await loop.recorder.events("mine") if e.type == "image_generated"]
        damage(loop.recorder.store.blobs.path(first.sha256))
    async with make(tmp_path, rounds=2) as loop:
        assert (await loop.resume("mine")).status is RunStatus.COMPLETED
        assert loop.recorder.store.blobs.get_bytes(first.sha256)
