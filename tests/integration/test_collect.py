"""Many runs from a file: concurrency, exact resume, dead letters."""

import asyncio
import itertools
import json
import sys
from pathlib import Path

import pytest
from emoloop.domain import UserError
from emoloop.graph.collect import Outcome, collect, count_lines
from emoloop.graph.loop import Loop, open_loop
from painter import Painter
from scripted import Scripted

LINES = [
    {"prompt": "a dog", "valence": 2, "arousal": -1},
    {"prompt": "a cat", "emotion": "awe", "rounds": 1},
    {"prompt": "a boat", "target": {"valence": -2}, "seed": 5},
    {"prompt": "a house", "arousal": 1, "images": 1},
    {"prompt": "a house", "arousal": 1, "images": 1},
]
BAD = ['{"prompt": "a dog"}', "no json", '{"prompt": "a dog", "valence": 9}']


def make(tmp_path: Path, painter: Painter | None = None, model: Scripted | None = None) -> Loop:
    return open_loop(
        generator=painter or Painter(delay=0.001),
        lvlm=model or Scripted(),
        home=str(tmp_path / "home"),
        loop={"rounds": 2, "images": 2},
    )


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join([*map(json.dumps, LINES), *lines]) + "\n")
    return path


async def outcomes(loop: Loop, source: Path, **options) -> list[Outcome]:
    seen: list[Outcome] = []
    await collect(loop, source, source.with_suffix(".failed"), on_outcome=seen.append, **options)
    return sorted(seen, key=lambda outcome: outcome.line)


async def test_every_line_becomes_a_run_and_again_only_what_is_missing(tmp_path):
    source = write(tmp_path)
    painter = Painter(delay=0.001)
    async with make(tmp_path, painter) as loop:
        assert count_lines(source) == 5
        first = await outcomes(loop, source, concurrency=3)
        assert [o.error for o in first] == [None] * 5
        assert not any(o.known for o in first)
        assert len({o.run_id for o in first}) == 5
        made = len(painter.requests)
        again = await outcomes(loop, source, concurrency=3)
        assert all(o.known for o in again)
        assert [o.run_id for o in again] == [o.run_id for o in first]
        assert len(painter.requests) == made
        runs = loop.recorder.store.runs()
        assert len(runs) == 5
        # Equal lines are two requests with seeds of their own; another seed makes other runs.
        assert first[3].run_id != first[4].run_id
        other = await outcomes(loop, source, seed=1)
        assert not set(o.run_id for o in other) & set(o.run_id for o in first)
        # Finished runs leave no states behind.
        assert [c async for c in loop.graph.checkpointer.alist(None)] == []  # pyright: ignore
    assert not source.with_suffix(".failed").exists()


async def test_it_goes_on_after_it_was_stopped(tmp_path):
    source = write(tmp_path)
    under_way = asyncio.Event()
    painter = Painter(delay=0.002, fail=lambda number: under_way.set() if number == 4 else None)
    async with make(tmp_path, painter) as loop:
        task = asyncio.create_task(collect(loop, source, tmp_path / "failed", concurrency=2))
        await under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with make(tmp_path, painter) as loop:
        assert [o.error for o in await outcomes(loop, source)] == [None] * 5
        broken_off = [
            r.model_dump(include={"prompt", "best_sha256", "gain"}) for r in loop.recorder.store.runs()
        ]
    # At most what was under way is made twice.
    assert len(painter.requests) <= 16 + 4
    async with make(tmp_path / "2") as loop:
        await outcomes(loop, source)
        calm = [r.model_dump(include={"prompt", "best_sha256", "gain"}) for r in loop.recorder.store.runs()]
    key = json.dumps
    assert sorted(map(key, broken_off)) == sorted(map(key, calm))


async def test_dead_letters_say_why_and_can_be_fed_again(tmp_path):
    source = write(tmp_path, *BAD)
    down = True
    model = Scripted(fail=lambda role, n: ValueError("critic on holiday") if down else None)
    async with make(tmp_path, model=model) as loop:
        first = await outcomes(loop, source)
        letters = [json.loads(line) for line in source.with_suffix(".failed").read_text().splitlines()]
        assert len(letters) == 8
        by_line = {letter["line"]: letter for letter in letters}
        assert "round 0: no critique at all: ValueError: critic on holiday" in by_line[1]["error"]
        assert by_line[1]["prompt"] == "a dog" and by_line[1]["run_id"] == first[0].run_id
        assert by_line[11]["error"].startswith("a target needs")
        assert by_line[13]["raw"] == "no json"
        down = False
        letters_file = tmp_path / "letters.jsonl"
        letters_file.write_text(
            "".join(json.dumps(letter) + "\n" for letter in letters if "raw" not in letter)
        )
        again = await outcomes(loop, letters_file)
        assert sum(o.error is None for o in again) == 5
        # The same runs, continued: nothing is drawn again that was there.
        assert {o.run_id for o in again if o.error is None} == {o.run_id for o in first[:5]}
        assert len(loop.recorder.store.runs()) == 5


async def test_the_source_is_never_overwritten(tmp_path):
    source = write(tmp_path)
    async with make(tmp_path) as loop:
        with pytest.raises(UserError, match="is the input"):
            await collect(loop, source, source)
    assert count_lines(source) == 5
    with pytest.raises(UserError, match="cannot read"):
        count_lines(tmp_path / "nothing")


async def test_another_model_makes_other_runs(tmp_path):
    source = write(tmp_path)
    async with make(tmp_path) as loop:
        first = await outcomes(loop, source)
    painter = Painter()
    painter.describe = lambda: {"model": "painter", "adapter": "abc"}
    async with make(tmp_path, painter) as loop:
        second = await outcomes(loop, source)
    assert not {o.run_id for o in first} & {o.run_id for o in second}


async def test_nobody_is_asked_for_a_review(tmp_path):
    source = write(tmp_path)
    async with open_loop(
        generator=Painter(),
        lvlm=Scripted(),
        home=str(tmp_path / "home"),
        loop={"rounds": 2, "images": 2, "review": True},
    ) as loop:
        assert [o.error for o in await outcomes(loop, source)] == [None] * 5


async def test_a_run_that_was_continued_was_not_there_already(tmp_path):
    source = write(tmp_path)
    down = True
    model = Scripted(fail=lambda role, n: ValueError("critic on holiday") if down else None)
    async with make(tmp_path, model=model) as loop:
        assert all(o.error and not o.known for o in await outcomes(loop, source))
        down = False
        assert all(not o.error and not o.known for o in await outcomes(loop, source))
        assert all(not o.error and o.known for o in await outcomes(loop, source))


async def test_dead_letters_of_lines_that_could_not_be_read_are_read_again(tmp_path):
    source = write(tmp_path, "no json", json.dumps({"line": 40, "raw": '{"prompt": "a boat", "valence": 1}'}))
    async with make(tmp_path) as loop:
        first = await outcomes(loop, source)
        assert [o.error for o in first if o.error] == ["not JSON: Expecting value: line 1 column 1 (char 0)"]
        letters = source.with_suffix(".failed").rename(tmp_path / "letters.jsonl")
        [again] = await outcomes(loop, letters)
        assert again.error and again.error.startswith("not JSON")


async def test_a_byte_order_mark_loses_no_line(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINES[0]).encode() + b"\r\n")
    async with make(tmp_path) as loop:
        assert [o.error for o in await outcomes(loop, source)] == [None]


async def test_a_pipe_without_end_is_read_no_further_than_the_work(tmp_path, monkeypatch):
    module, read = sys.modules[collect.__module__], 0
    monkeypatch.setattr(module, "_AHEAD", 16)
    monkeypatch.setattr(module, "_CHUNK", 4)

    def endless(source):
        nonlocal read
        for read in itertools.count(1):
            yield read, json.dumps({"prompt": "a dog", "valence": 1})

    monkeypatch.setattr(module, "read_lines", endless)
    painter = Painter(delay=30)
    async with make(tmp_path, painter) as loop:
        queue = loop.recorder.store.queue
        task = asyncio.create_task(collect(loop, tmp_path / "pipe", tmp_path / "failed", concurrency=2))
        for _ in itertools.count():
            if sum(queue.counts().get("run", {}).values()) >= 16 and painter.requests:
                break
            await asyncio.sleep(0.005)
        # What waits in the queue, in its next chunk, between the threads, and in the reader's hand.
        assert read <= 16 + 4 + 4 + 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert read <= 16 + 4 + 4 + 1
