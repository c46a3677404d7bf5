"""What a log tells another run: the latest readings, and the rewrites that came near a target."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from emoloop.domain import Emotion, EmotionTarget
from emoloop.traces.experience import cursor_at, examples, readings
from emoloop.traces.store import open_store
from rl_log import run_events, settings_for


def test_readings_are_the_latest_of_one_generator(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path)) as store:
        for run in range(3):
            store.append(
                *run_events(store, run, reading=lambda round_, index, run=run: (run, round_ + index / 10))
            )
        store.append(*run_events(store, 3, model="other"))
        store.append(*run_events(store, 4, adapter="abc", reward=lambda run, round_, index: index or None))
        last = cursor_at(store, datetime.now(UTC))
        found = readings(store, last, 100, model="tiny")
        assert len(found) == 3 * 2 * 3
        assert found[0] == ("a house by the sea bright 1", 2.0, 1.2) and found[-1] == ("a dog", 0.0, 0.0)
        # Only so many of the latest events are looked through, and these are of other generators.
        assert readings(store, last, 2, model="tiny") == []
        assert readings(store, last - 40, 2, model="tiny") == found[:2]
        # A missing reading is none.
        assert len(readings(store, last, 100, model="tiny", adapter="abc")) == 4
        # A run sees what there was when it began.
        first = next(e for e in store.events("run-0001"))
        assert cursor_at(store, first.time) < last
        assert readings(store, first.cursor, 100, model="tiny") == found[-6:]
        assert cursor_at(store, datetime(2000, 1, 1, tzinfo=UTC)) == 0


def test_rewrites_are_those_of_other_prompts_that_came_near(tmp_path: Path) -> None:
    target = EmotionTarget(valence=1.5, arousal=-1.0)

    def log(run: int, valence: float, arousal: float = -1.0, **more: object) -> None:
        aim = more.pop("target", target)
        last = run_events(
            store,
            run,
            target=aim,
            reading=lambda round_, index: (valence * round_, arousal),
            **more,  # type: ignore[arg-type]
        )
        store.append(*last)

    with open_store(settings_for(tmp_path)) as store:
        log(0, 1.0)
        log(1, 1.4)
        log(2, 0.6)  # too far from the target
        log(3, 1.5, arousal=0.0)
        log(4, 1.5, model="other")
        log(5, 1.5, target=EmotionTarget(valence=-1.5))  # was after something else
        log(6, 1.5, reward=lambda run, round_, index: -float(round_))  # the neutral prompt won
        log(7, 1.5, category=Emotion.CONTENTMENT)
        log(9, 1.3)  # the same neutral prompt as run 1
        done = datetime.now(UTC)
        log(10, 1.5)
        about = {"neutral": "the neutral one", "model": "tiny"}
        found = examples(store, target, done, 9, **about)
        assert [it.neutral for it in found] == ["a hill", "a cat", "a dog"]
        assert found[1] == ("a cat", "a cat bright 1", pytest.approx(1.4), -1.0)
        assert examples(store, target, done, 1, **about) == found[:1]
        assert examples(store, target, done, 9, **{**about, "neutral": "a cat"}) == [found[0], found[2]]
        # One axis alone; a category as well.
        one = examples(store, EmotionTarget(valence=1.5), done, 9, **about)
        assert [it.neutral for it in one] == ["a boat", "a hill", "a cat", "a dog"]
        content = EmotionTarget(valence=1.5, arousal=-1.0, category=Emotion.CONTENTMENT)
        assert [it.neutral for it in examples(store, content, done, 9, **about)] == ["a hill"]
        # What was done later is not seen.
        assert len(examples(store, target, datetime.now(UTC), 9, **about)) == 4
