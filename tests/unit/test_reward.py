"""Rewards: what a function is called with, what a sum says, and that a missing part is never 0."""

from __future__ import annotations

import asyncio
import math

import pytest
from emoloop.domain import Critique, EmotionTarget, UserError
from emoloop.settings import load_settings, read_set
from emoloop.tools.reward import Look, Reward, load_reward, terms
from PIL import Image

TARGET = EmotionTarget(valence=1, arousal=1)
CRITIQUE = Critique(valence=0.5, arousal=1, alignment=1)


def look(shade: int = 100) -> Look:
    return Look(CRITIQUE, TARGET, "a dog", Image.new("RGB", (2, 2), (shade,) * 3))


def light(picture, prompt, critique, target):
    assert (prompt, critique, target) == ("a dog", CRITIQUE, TARGET)
    return picture.getpixel((0, 0))[0] / 100


async def light_later(picture, prompt, critique, target):
    await asyncio.sleep(0)
    return light(picture, prompt, critique, target)


class Many:
    """A reward of many pictures; counts how many came at once."""

    name, version = "many", "3"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pictures, prompts, critiques, targets):
        self.batches.append(len(pictures))
        return [light(*it) for it in zip(pictures, prompts, critiques, targets, strict=True)]


class ManyLater(Many):
    async def __call__(self, pictures, prompts, critiques, targets):
        await asyncio.sleep(0)
        return super().__call__(pictures, prompts, critiques, targets)


async def values(reward: Reward, *looks: Look) -> list[float | None]:
    return [it[-1].value for it in await asyncio.gather(*map(reward.values, looks))]


@pytest.mark.parametrize("reward", [light, light_later, Many, ManyLater])
async def test_a_reward_that_takes_the_picture_gets_it(reward):
    loaded = load_reward(reward)
    assert loaded.sees
    assert await values(loaded, look(100), look(50)) == [1.0, 0.5]


async def test_what_comes_while_a_batch_is_valued_shares_the_next():
    reward = Many()
    loaded = load_reward(reward)
    assert await values(loaded, *map(look, range(0, 200, 10))) == [n / 100 for n in range(0, 200, 10)]
    assert sum(reward.batches) == 20 and max(reward.batches) <= 16 and len(reward.batches) == 2


async def test_a_batch_that_was_cancelled_is_valued_for_the_others():
    begun, free = asyncio.Event(), asyncio.Event()

    async def slow(pictures, prompts, critiques, targets):
        begun.set()
        await free.wait()
        return [1.0] * len(pictures)

    loaded = load_reward(slow)
    first, second = (asyncio.ensure_future(values(loaded, look())) for _ in range(2))
    await begun.wait()
    first.cancel()
    free.set()
    assert await second == [1.0]


async def test_a_batch_of_another_length_and_an_error_are_missing_with_the_reason():
    def short(pictures, prompts, critiques, targets):
        return [1.0]

    def broken(picture, prompt, critique, target):
        raise ZeroDivisionError("no light")

    cut = load_reward(short)
    [one], [two] = await asyncio.gather(*(cut.values(look()) for _ in range(2)))
    assert one.value is None and "ValueError: 1 values for 2 pictures" in (two.reason or "")
    [it] = await load_reward(broken).values(look())
    assert it.value is None and (it.reason or "").endswith("broken: ZeroDivisionError: no light")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda critique: 0.0,
        lambda a, b, c: 0.0,
        lambda image, prompt, critique, target: 0.0,
        lambda picture, prompt, critique, target, more: 0.0,
        max,
    ],
)
def test_a_reward_of_something_else_is_refused_when_it_is_loaded(wrong):
    with pytest.raises(
        UserError, match=r"takes none of \(critique, target\), \(picture, prompt, critique, target\)"
    ):
        load_reward(wrong)


def test_todays_rewards_keep_working():
    for known in (
        lambda c, t: c.valence,
        lambda *both: both[0].valence,
        lambda critique, target, scale=1: 0.5,
    ):
        reward = load_reward(known)
        assert not reward.sees and reward(CRITIQUE, TARGET) == 0.5


def test_parts_and_weights_are_read_from_text():
    assert terms("emotion") == {"emotion": 1}
    assert terms("emotion + 0.5*pickscore:/a b/c++ + -1e-3 * m.n:X") == {
        "emotion": 1,
        "pickscore:/a b/c++": 0.5,
        "m.n:X": -0.001,
    }
    for wrong in ("1..2*emotion", "emotion + ", "emotion + emotion"):
        with pytest.raises(UserError, match="reward"):
            terms(wrong)


@pytest.mark.parametrize(
    "given", [{"emotion": 1, "a.b:C": 0.5}, '{"emotion": 1, "a.b:C": 0.5}', "{emotion: 1, 'a.b:C': 0.5}"]
)
def test_settings_take_a_mapping(given):
    assert terms(load_settings({"loop": {"reward": given}}).loop.reward) == {"emotion": 1, "a.b:C": 0.5}


def test_settings_take_a_list_and_words_of_the_command_line(monkeypatch):
    assert terms(load_settings({"loop": {"reward": ["emotion", "a.b:C"]}}).loop.reward) == {
        "emotion": 1,
        "a.b:C": 1,
    }
    words = read_set(["loop.reward={emotion: 2}"])
    assert terms(load_settings(words).loop.reward) == {"emotion": 2}
    monkeypatch.setenv("EMOLOOP_LOOP__REWARD", "emotion + 0.5*a.b:C")
    assert load_settings().loop.reward == "emotion + 0.5*a.b:C"


def sum_of(monkeypatch, **parts) -> Reward:
    for name, (function, _) in parts.items():
        monkeypatch.setitem(__import__("emoloop.tools.reward", fromlist=["x"]).REWARDS, name, function)
    return load_reward(" + ".join(f"{weight}*{name}" for name, (_, weight) in parts.items()))


async def test_a_sum_says_what_each_part_said(monkeypatch):
    def dim(picture, prompt, critique, target):
        return -light(picture, prompt, critique, target)

    dim.name, dim.version = "dim", "7"
    reward = sum_of(monkeypatch, emotion=(lambda c, t: c.valence, 1), dim=(dim, 0.5))
    said = await reward.values(look(50))
    assert [(it.value, it.weight) for it in said] == [(0.5, 1), (-0.5, 0.5), (0.25, None)]
    assert reward.name.endswith(" + 0.5*dim") and reward.version == "0 + 7"
    assert reward.now(look(50)) == 0.25
    with pytest.raises(UserError, match="looks at the picture"):
        reward(CRITIQUE, TARGET)


async def test_a_missing_part_makes_the_sum_missing_and_never_0(monkeypatch):
    reward = sum_of(monkeypatch, one=(lambda c, t: 1.0, 1), none=(lambda c, t: None, 0.1))
    *parts, whole = await reward.values(look())
    assert [it.value for it in parts] == [1.0, None] and whole.value is None
    assert whole.reason == parts[1].reason and "gave None" in (whole.reason or "")
    assert math.isnan(reward(CRITIQUE, TARGET))
