"""The loop over a real log, real checkpoints and a real graph; generator and chat model follow simple rules."""

import asyncio
import json
import sqlite3
from collections import Counter
from typing import Any

import emoloop
import pytest
from emoloop.domain import EmotionTarget, Failure, Missing, RunStatus, StopReason, UserError
from emoloop.events import (
    Critiqued,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunStarted,
)
from emoloop.graph import build, retry
from emoloop.graph.loop import Loop, open_loop
from emoloop.graph.nodes import Nodes
from emoloop.graph.state import State
from emoloop.traces.database import StoreError
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from painter import Painter
from scripted import Scripted, critic_answer

TARGET = EmotionTarget(valence=2, arousal=-1)
DOWN = ConnectionError("the server is away")


def make(tmp_path, *, painter: Painter | None = None, model: Scripted | None = None, **options) -> Loop:
    return open_loop(
        generator=painter or Painter(),
        lvlm=model or Scripted(),
        home=str(tmp_path / "home"),
        loop={"rounds": 3, "images": 3, "patience": 3, **options},
    )


@pytest.fixture
def fast_retries(monkeypatch):
    """The same policy without the pauses."""
    policy = retry.retry_policy()._replace(initial_interval=0.001, jitter=False)
    monkeypatch.setattr(build, "retry_policy", lambda: policy)


def fails(role: str, *numbers: int, error: Exception | str = DOWN):
    return lambda asked, number: error if asked == role and (not numbers or number in numbers) else None


def essence(result) -> dict:
    """A result without what belongs to one run alone."""
    return result.model_dump(exclude={"run_id": True, "home": True})


# ---- running


@pytest.mark.parametrize("calls", [0, 3])
async def test_a_loop_that_is_closed_ends_its_open_requests_with_one_error(tmp_path, calls):
    begun = asyncio.Event()
    painter = Painter(delay=0.05, fail=lambda number: begun.set() if number >= calls else None)
    async with make(tmp_path, painter=painter) as loop:
        runs = [asyncio.create_task(loop.run("a dog", TARGET, run_id=f"r{n}", seed=n)) for n in range(3)]
        await begun.wait()
        recorder = loop.recorder
    for error in await asyncio.gather(*runs, return_exceptions=True):
        # One that had not begun to work is told that the loop is not open.
        assert isinstance(error, Failure if "was closed" in str(error) else RuntimeError), error
        assert "the loop was closed" in str(error) or "the loop is not open" in str(error), error
    with pytest.raises(StoreError, match="the log is closed"):
        await recorder.record(RunStarted(run_id="late", prompt="p", target=TARGET, seed=1))
    async with make(tmp_path) as loop:  # the same requests again go on
        resumed = [await loop.run("a dog", TARGET, run_id=f"r{n}", seed=n) for n in range(3)]
    assert {result.status for result in resumed} == {RunStatus.COMPLETED}


async def test_a_run_from_request_to_result(tmp_path):
    async with make(tmp_path) as loop:
        seen: list = []
        result = await loop.run("a dog by the sea", TARGET, seed=7, on_event=seen.append)
        events = await loop.recorder.events(result.run_id)
    assert (result.status, result.stop_reason) == (RunStatus.COMPLETED, StopReason.ROUNDS_USED)
    assert [len(r.candidates) for r in result.rounds] == [3, 3, 3]
    assert result.rounds[0].prompt == "a dog by the sea"
    rewards = [c.reward for r in result.rounds for c in r.candidates]
    assert result.best is not None and result.best.reward == max(rewards)
    won = result.rounds[result.best.round]
    assert won.mean_reward is not None and result.rounds[0].mean_reward is not None
    assert result.gain == pytest.approx(won.mean_reward - result.rounds[0].mean_reward)
    assert result.best.image.size == (16, 16)
    kinds = Counter(type(e).__name__ for e in events)
    assert kinds == {
        "RunStarted": 1,
        "ImageGenerated": 9,
        "Critiqued": 9,
        "Rewarded": 9,
        "Rewritten": 2,
        "RunFinished": 1,
    }
    assert seen == events


async def test_the_log_says_what_is_needed_to_make_it_again(tmp_path):
    async with make(tmp_path, rounds=1, images=1) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    started = next(e for e in events if isinstance(e, RunStarted))
    assert (started.prompt, started.seed, started.settings["loop"]["rounds"]) == ("a dog", 7, 1)
    assert started.settings["objects"] == ["generator", "lvlm"]
    assert "api_key" not in json.dumps(started.settings)
    critiqued = next(e for e in events if isinstance(e, Critiqued))
    assert (critiqued.model, critiqued.prompt_version) == ("Scripted", "critic@1")
    rewarded = next(e for e in events if isinstance(e, Rewarded))
    assert (rewarded.name, rewarded.version) == ("emotion", "1")


async def test_the_same_seed_gives_the_same_run(tmp_path):
    async with make(tmp_path) as loop:
        one = await loop.run("a dog", TARGET, seed=7)
        two = await loop.run("a dog", TARGET, seed=7)
        other = await loop.run("a dog", TARGET, seed=8)
    assert one.run_id != two.run_id
    assert essence(one) == essence(two)
    assert essence(one) != essence(other)


async def test_sixteen_at_once_are_each_as_alone(tmp_path):
    async with make(tmp_path, model=Scripted(delay=0.001), painter=Painter(delay=0.001)) as loop:
        asked = [
            (f"a {w} by the sea", EmotionTarget(valence=v)) for w in ("dog", "cat") for v in range(-3, 4, 1)
        ][:14]
        asked += [("a boat", EmotionTarget(category="awe")), ("a boat", EmotionTarget(arousal=1))]
        together = await asyncio.gather(*(loop.run(p, t, seed=i) for i, (p, t) in enumerate(asked)))
        ids = {result.run_id for result in together}
        assert len(ids) == 16
        for i, (prompt, target) in enumerate(asked):
            assert essence(await loop.run(prompt, target, seed=i)) == essence(together[i])
        for result in together:
            events = await loop.recorder.events(result.run_id)
            assert {e.run_id for e in events} == {result.run_id}
            assert sum(isinstance(e, ImageGenerated) for e in events) == 3 * len(result.rounds)


async def test_it_stops_at_the_target(tmp_path):
    model = Scripted(fail=lambda role, n: critic_answer(1.9, -1.1) if role == "critic" and n == 4 else None)
    async with make(tmp_path, model=model) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.stop_reason is StopReason.TARGET_REACHED
    assert len(result.rounds) == 2
    assert result.best is not None and result.best.round == 1


async def test_it_stops_when_nothing_gets_better(tmp_path):
    model = Scripted(fail=lambda role, n: critic_answer(0, 0) if role == "critic" else None)
    async with make(tmp_path, model=model, rounds=9, patience=2) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.stop_reason is StopReason.NO_IMPROVEMENT
    assert len(result.rounds) == 3
    assert result.best is not None and (result.best.round, result.best.index) == (0, 0)


async def test_a_reward_of_ones_own(tmp_path):
    def warmth(critique, target):
        return critique.valence

    loop = open_loop(
        generator=Painter(),
        lvlm=Scripted(),
        reward=warmth,
        home=str(tmp_path),
        loop={"rounds": 2, "images": 2},
    )
    async with loop:
        result = await loop.run("a dog", TARGET, seed=1)
        [event, *_] = [e for e in await loop.recorder.events(result.run_id) if isinstance(e, Rewarded)]
    assert result.best is not None
    assert result.best.reward == result.best.critique.valence  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert event.name.endswith("warmth")


# ---- what goes wrong


async def test_some_critiques_missing_is_a_warning(tmp_path):
    async with make(tmp_path, model=Scripted(fail=fails("critic", 1, error=ValueError("odd")))) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    assert result.status is RunStatus.COMPLETED
    assert result.warnings == ["round 0: 1 of 3 critiques missing: ValueError: odd"]
    missing = [c for c in result.rounds[0].candidates if isinstance(c.critique, Missing)]
    assert len(missing) == 1 and missing[0].reward is None
    rewards = [e for e in events if isinstance(e, Rewarded)]
    assert [e.value for e in rewards].count(None) == 1
    assert all(e.reason for e in rewards if e.value is None)
    assert 0.0 not in [e.value for e in rewards if e.value is not None]


async def test_garbage_is_kept_and_named(tmp_path):
    async with make(tmp_path, model=Scripted(fail=fails("critic", error="what a lovely picture"))) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert (result.status, result.stop_reason) == (RunStatus.FAILED, StopReason.NO_CRITIQUE)
    assert "no critique at all: no usable answer" in result.warnings[-1]
    assert len(result.rounds[0].candidates) == 3
    critique = result.rounds[0].candidates[0].critique
    assert isinstance(critique, Missing) and critique.raw == "what a lovely picture"
    assert result.best is None


async def test_a_critic_that_hangs(tmp_path):
    loop = open_loop(
        generator=Painter(),
        lvlm=Scripted(delay=60),
        home=str(tmp_path),
        loop={"rounds": 2, "images": 2},
    )
    loop.settings.lvlm.timeout = 0.02
    async with loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.stop_reason is StopReason.NO_CRITIQUE
    assert "no answer within 0.02 s" in result.warnings[-1]


async def test_a_passing_failure_is_tried_again_and_costs_nothing(tmp_path, fast_retries):
    model = Scripted(fail=fails("critic", 1, 3))
    painter = Painter(fail=lambda n: RuntimeError("CUDA out of memory") if n == 2 else None)
    async with make(tmp_path, model=model, painter=painter, rounds=1) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        plain = make(tmp_path / "2", rounds=1)
        async with plain:
            undisturbed = await plain.run("a dog", TARGET, seed=7)
    assert result.warnings == []
    assert model.calls["critic"] == 5
    assert len(painter.requests) == 4
    assert [c.reward for c in result.rounds[0].candidates] == [
        c.reward for c in undisturbed.rounds[0].candidates
    ]


async def test_a_cancellation_between_two_nodes_ends_the_run(tmp_path, monkeypatch):
    start, later = Nodes.start, asyncio.get_running_loop().call_soon

    async def starting(self, state, runtime):
        done = await start(self, state, runtime)
        cancel(turns)
        return done

    def cancel(turns: int) -> None:
        if turns:
            later(cancel, turns - 1)
        else:
            run.cancel()

    monkeypatch.setattr(Nodes, "start", starting)
    async with make(tmp_path) as loop:
        for turns in range(24):  # of the event loop, after the node's end
            config: Any = {"configurable": {"thread_id": f"t{turns}"}}
            asked: Any = {"prompt": "a dog", "target": TARGET.model_dump()}
            run = asyncio.create_task(loop.graph.ainvoke(asked, config))
            await asyncio.wait([run])
            assert run.cancelled(), turns


async def test_a_node_that_takes_too_long_is_ended_before_it_is_tried_again(tmp_path, fast_retries):
    at_work = most = 0

    class Slow(Painter):
        async def generate(self, requests):
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            try:
                self.delay = 60 if len(self.requests) < 2 else 0
                return await super().generate(requests)
            finally:
                await asyncio.sleep(0.01)  # it takes a while to stop
                at_work -= 1

    options = {"rounds": 1, "images": 1, "proposals": 1, "node_timeout": 0.2}
    async with make(tmp_path, painter=(slow := Slow()), **options) as loop:
        result = await loop.run("a dog", TARGET, seed=1)
    assert result.status is RunStatus.COMPLETED and (len(slow.requests), most) == (3, 1)


async def test_a_critic_that_is_down_fails_the_run_and_resume_goes_on(tmp_path, fast_retries):
    down = True
    model = Scripted(fail=lambda role, n: DOWN if down else None)
    painter = Painter()
    async with make(tmp_path, model=model, painter=painter) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        assert (result.status, result.stop_reason) == (RunStatus.FAILED, StopReason.NO_CRITIQUE)
        assert "the server is away" in result.warnings[-1]
        assert len(painter.requests) == 3
        down = False
        again = await loop.resume(result.run_id)
        fresh = await loop.run("a dog", TARGET, seed=7)
    assert again.status is RunStatus.COMPLETED
    assert again.run_id == result.run_id
    assert essence(again) == essence(fresh)
    assert len(painter.requests) == 18


async def test_a_rewriter_that_is_down_costs_a_warning(tmp_path, fast_retries):
    async with make(tmp_path, model=Scripted(fail=fails("rewriter"))) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.status is RunStatus.COMPLETED
    assert [r.prompt for r in result.rounds] == ["a dog"] * 3
    assert result.warnings[0] == ("round 1: kept the best prompt so far: ConnectionError: the server is away")


async def test_pictures_that_cannot_be_made(tmp_path):
    painter = Painter(fail=lambda n: ValueError("bad weather") if n in (1, 4) else None)
    async with make(tmp_path, painter=painter) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    assert result.status is RunStatus.COMPLETED
    assert result.warnings[0] == "round 0: 1 of 3 images could not be made: ValueError: bad weather"
    assert [len(r.candidates) for r in result.rounds] == [2, 2, 3]
    assert sum(isinstance(e, GenerationFailed) for e in events) == 2


async def test_no_picture_at_all_fails_the_run(tmp_path):
    painter = Painter(fail=lambda n: ValueError("bad weather") if n < 3 else None)
    async with make(tmp_path, painter=painter) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        assert (result.status, result.stop_reason) == (RunStatus.FAILED, StopReason.ERROR)
        assert result.warnings == ["round 0: no image could be made: ValueError: bad weather"]
        again = await loop.resume(result.run_id)
    assert again.status is RunStatus.COMPLETED
    assert [len(r.candidates) for r in again.rounds] == [3, 3, 3]


async def test_a_reward_that_fails_is_missing(tmp_path):
    def odd(critique, target):
        return float("nan")

    loop = open_loop(generator=Painter(), lvlm=Scripted(), reward=odd, home=str(tmp_path), loop={"images": 2})
    async with loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    assert result.stop_reason is StopReason.NO_REWARD
    assert {e.reason for e in events if isinstance(e, Rewarded)} == {f"reward {odd.__qualname__} gave nan"}


async def test_a_reward_that_failed_is_had_on_resume_and_nothing_is_read_again(tmp_path):
    broken = True

    def moody(critique, target):
        if broken:
            raise ZeroDivisionError("no mood")
        return critique.valence

    model = Scripted()
    loop = open_loop(
        generator=Painter(), lvlm=model, reward=moody, home=str(tmp_path), loop={"rounds": 1, "images": 2}
    )
    async with loop:
        result = await loop.run("a dog", TARGET, seed=7)
        [said] = result.warnings
        assert said.startswith("round 0: no reward at all: reward ") and "ZeroDivisionError: no mood" in said
        broken = False
        again = await loop.resume(result.run_id)
        events = await loop.recorder.events(result.run_id)
    assert again.status is RunStatus.COMPLETED and again.best is not None
    assert model.calls["critic"] == 2
    rewards = [(e.node, e.value is None) for e in events if isinstance(e, Rewarded)]
    assert rewards == [("reward", True)] * 2 + [("reward.2", False)] * 2


async def test_unknown_words_are_named_once(tmp_path):
    async with make(tmp_path) as loop:
        seen: list = []
        result = await loop.run("an astronaut by the sea", TARGET, seed=7, on_event=seen.append)
    assert result.warnings == [
        "the model does not know 'an' (nearest: dog, cat); 'astronaut' (nearest: dog, cat)"
    ]
    assert [m.warnings for m in seen if getattr(m, "warnings", None)] == [result.warnings] * 2


async def test_the_unread_end_of_a_prompt_is_a_warning(tmp_path):
    painter = Painter()
    painter.unread = lambda prompt: "by the sea"  # type: ignore[attr-defined]
    async with make(tmp_path, painter=painter, rounds=1) as loop:
        result = await loop.run("a dog by the sea", TARGET, seed=7)
    assert result.warnings == [
        "the prompt is too long for the model, which does not read its end: 'by the sea'"
    ]


async def test_a_generator_needs_to_tell_nothing_of_how_it_paints(tmp_path):
    painter = Painter()
    painter._making = dict  # type: ignore[method-assign]
    async with make(tmp_path, painter=painter, rounds=1, images=1) as loop:
        result = await loop.run("a dog by the sea", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    assert result.status is RunStatus.COMPLETED and result.warnings == []
    [made] = [event for event in events if isinstance(event, ImageGenerated)]
    assert (made.model, made.height, made.width) == ("Painter", 16, 16)
    assert (made.steps, made.guidance) == (None, None)


async def test_strict_refuses_unknown_words_before_anything_is_written(tmp_path):
    loop = open_loop(generator=Painter(), lvlm=Scripted(), home=str(tmp_path))
    loop.settings.generator.strict = True
    async with loop:
        with pytest.raises(UserError, match="astronaut"):
            await loop.run("an astronaut", TARGET)
        assert loop.recorder.store.runs() == []


@pytest.mark.parametrize(
    ("prompt", "target", "options", "said"),
    [
        ("", TARGET, {}, "prompt is empty"),
        ("a dog", {"valence": 7}, {}, "valence 7"),
        ("a dog", TARGET, {"rounds": 0}, "rounds"),
        ("a dog", TARGET, {"rouns": 1}, "no option rouns"),
        ("a dog", TARGET, {"seed": -1}, "seed -1"),
        ("a dog", TARGET, {"run_id": "../x"}, "run id"),
    ],
)
async def test_wrong_requests_write_nothing(tmp_path, prompt, target, options, said):
    async with make(tmp_path) as loop:
        with pytest.raises(UserError, match=said):
            await loop.run(prompt, target, **options)
        assert loop.recorder.store.runs() == []
        assert [c async for c in loop.graph.checkpointer.alist(None)] == []  # pyright: ignore


# ---- breaking off and going on


async def test_it_goes_on_where_it_broke_off(tmp_path):
    async with make(tmp_path) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)

    for stop_at in range(1, 26, 4):
        painter, model = Painter(), Scripted()
        count = 0
        run_id = f"broken-{stop_at}"
        async with make(tmp_path, painter=painter, model=model) as loop:
            messages = loop.stream("a dog", TARGET, seed=7, run_id=run_id)
            async for _ in messages:
                count += 1
                if count == stop_at:
                    break
            await messages.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            before = await loop.recorder.events(run_id)
        async with make(tmp_path, painter=painter, model=model) as loop:
            result = await loop.resume(run_id)
            after = await loop.recorder.events(run_id)
        assert essence(result) == essence(undisturbed)
        assert after[: len(before)] == before
        assert len({e.key for e in after}) == len(after) == 31
        # Nothing acknowledged is made again; what was under way when it broke off may be.
        assert 9 <= len(painter.requests) <= 12
        assert 9 <= model.calls["critic"] <= 12


async def test_the_log_alone_suffices(tmp_path):
    painter = Painter()
    async with make(tmp_path, painter=painter) as loop:
        messages = loop.stream("a dog", TARGET, seed=7, run_id="lost")
        async for message in messages:
            if isinstance(message, Rewritten) and message.round == 2:
                break
        await messages.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    for file in (tmp_path / "home").glob("checkpoints.db*"):
        file.unlink()
    async with make(tmp_path, painter=painter) as loop:
        result = await loop.resume("lost")
        fresh = await loop.run("a dog", TARGET, seed=7)
    assert essence(result) == essence(fresh)


async def test_a_complete_run_is_given_back(tmp_path):
    painter = Painter()
    async with make(tmp_path, painter=painter) as loop:
        one = await loop.run("a dog", TARGET, seed=7, run_id="mine")
        assert await loop.run("a dog", TARGET, seed=7, run_id="mine") == one
        assert await loop.resume("mine") == one
        assert await loop.resume("last") == one
        assert len(painter.requests) == 9
        with pytest.raises(UserError, match="asked for something else"):
            await loop.run("a cat", TARGET, run_id="mine")
        with pytest.raises(UserError, match="no run 'nothing'"):
            await loop.resume("nothing")


async def test_another_model_does_not_continue_a_run(tmp_path):
    async with make(tmp_path) as loop:
        messages = loop.stream("a dog", TARGET, seed=7, run_id="other")
        async for message in messages:
            if isinstance(message, Rewarded):
                break
        await messages.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    painter = Painter()
    painter.describe = lambda: {"model": "painter", "adapter": "abc"}
    async with make(tmp_path, painter=painter) as loop:
        with pytest.raises(UserError, match="adapter None, this loop has abc"):
            await loop.resume("other")
    async with open_loop(
        generator=Painter(), lvlm=Scripted(), reward=lambda *_: 1.0, home=str(tmp_path / "home")
    ) as loop:
        with pytest.raises(UserError, match=r"reward name emotion, this loop has .*lambda"):
            await loop.resume("other")
    async with make(tmp_path) as loop:
        loop.parts.critic.asker.name = "another"
        with pytest.raises(UserError, match="critic model Scripted, this loop has another"):
            await loop.resume("other")


# ---- people


async def test_a_person_may_comment_write_or_stop(tmp_path):
    model = Scripted()
    answers = iter(["more sun please", {"prompt": "a red dog"}, {"stop": True}])
    asked: list = []

    def reviewer(review):
        asked.append(review)
        return next(answers)

    async with make(tmp_path, model=model, rounds=9, review=True) as loop:
        result = await loop.run("a dog", TARGET, seed=7, reviewer=reviewer)
        events = await loop.recorder.events(result.run_id)
    assert result.stop_reason is StopReason.STOPPED
    assert result.status is RunStatus.COMPLETED
    assert [r.prompt for r in result.rounds][2] == "a red dog"
    assert [a["round"] for a in asked] == [0, 1, 2]
    rewriter = [m for m in model.seen if "more sun please" in str(m[-1].content)]
    assert len(rewriter) == 1
    assert [e.comment for e in events if isinstance(e, HumanFeedback)] == ["more sun please"]


async def test_a_review_may_be_answered_later(tmp_path):
    async with make(tmp_path, rounds=2, review=True) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        assert result.status is RunStatus.INTERRUPTED
    async with make(tmp_path, rounds=2, review=True) as loop:
        messages = [m async for m in loop.stream_resume(result.run_id)]
        assert messages == await loop.recorder.events(result.run_id)
        question = await loop.review(result.run_id)
        assert question is not None and question["round"] == 0
        done = await loop.resume(result.run_id, {"prompt": "a bright dog"})
    assert done.status is RunStatus.COMPLETED
    assert done.rounds[1].prompt == "a bright dog"


@pytest.mark.parametrize("nothing", [None, {}, ""])
async def test_to_say_nothing_is_to_go_on(tmp_path, nothing):
    asked: list = []
    async with make(tmp_path, rounds=2, review=True) as loop:
        result = await loop.run("a dog", TARGET, seed=7, reviewer=lambda it: asked.append(it) or nothing)
    assert (result.status, len(asked)) == (RunStatus.COMPLETED, 1)


async def test_an_answered_review_is_not_asked_again_after_a_kill(tmp_path):
    home = tmp_path / "home"
    async with make(tmp_path, rounds=3, review=True) as loop:
        run_id = (await loop.run("a dog", TARGET, seed=7)).run_id
    kept = {file: file.read_bytes() for file in home.glob("checkpoints.db*")}
    async with make(tmp_path, rounds=3, review=True) as loop:
        messages = loop.stream_resume(run_id, {"prompt": "a dog on a beach"})
        async for message in messages:
            if isinstance(message, ImageGenerated) and message.round == 1:
                break
        await messages.aclose()
    for file, data in kept.items():  # a killed process saves no state
        file.write_bytes(data)
    async with make(tmp_path, rounds=3, review=True) as loop:
        assert await loop.review(run_id) is None
        result = await loop.resume(run_id)
        question = await loop.review(run_id)
        assert result.status is RunStatus.INTERRUPTED and question is not None and question["round"] == 1
        assert [r.prompt for r in result.rounds] == ["a dog", "a dog on a beach"]


async def test_a_log_older_than_the_saved_state_is_gone_on_from(tmp_path):
    home = tmp_path / "home"
    async with make(tmp_path, rounds=3, review=True) as loop:
        run_id = (await loop.run("a dog", TARGET, seed=7)).run_id
    kept = {file: file.read_bytes() for file in home.glob("events.db*")}
    async with make(tmp_path, rounds=3, review=True) as loop:
        assert (await loop.resume(run_id, "warmer")).status is RunStatus.INTERRUPTED
    for file, data in kept.items():
        file.write_bytes(data)
    async with make(tmp_path, rounds=3, review=True) as loop:
        assert await loop.review(run_id) is None
        result = await loop.resume(run_id, reviewer=lambda question: None)
        calm = await loop.run("a dog", TARGET, seed=7, reviewer=lambda question: None)
    assert essence(result) == essence(calm)


async def test_states_are_read_by_plain_and_by_async_code(tmp_path):
    where = {"configurable": {"thread_id": "a"}}
    async with make(tmp_path, rounds=1, images=1) as loop:
        await loop.graph.ainvoke({"prompt": "a dog", "target": {"valence": 1.0}}, where)  # pyright: ignore
        state = loop.graph.get_state(where)  # pyright: ignore
        assert state.values["status"] == "completed"
        assert state == await loop.graph.aget_state(where)  # pyright: ignore
        before = [it.config async for it in loop.graph.aget_state_history(where)]  # pyright: ignore
        assert before and before == [it.config for it in loop.graph.get_state_history(where)]  # pyright: ignore


@pytest.mark.parametrize("wrong", [{"promt": "x"}, {"prompt": "x" * 9000, "comment": "sun"}, 7])
async def test_a_wrong_answer_leaves_the_review_open(tmp_path, wrong):
    async with make(tmp_path, rounds=2, review=True) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        with pytest.raises(UserError):
            await loop.resume(result.run_id, wrong)
        assert not any(isinstance(e, HumanFeedback) for e in await loop.recorder.events(result.run_id))
        done = await loop.resume(result.run_id, {"prompt": "a bright dog"})
    assert (done.status, done.rounds[1].prompt) == (RunStatus.COMPLETED, "a bright dog")


# ---- as a LangGraph


async def test_the_graph_works_as_langgraph_users_know_it(tmp_path):
    async with make(tmp_path) as loop:
        config = {"configurable": {"thread_id": "t"}}
        begin = {"prompt": "a dog", "target": {"valence": 2, "arousal": -1}}
        out = await loop.graph.ainvoke(begin, config)  # pyright: ignore
        assert (out["run_id"], out["status"], len(out["rounds"])) == ("t", "completed", 3)
        assert out["best"]["image"].endswith(out["best"]["sha256"] + ".png")
        json.dumps(out)
        state = await loop.graph.aget_state(config)  # pyright: ignore
        assert state.values["best"] == out["best"] and state.next == ()
        stream = loop.graph.astream(begin, config, context={"rounds": 1}, stream_mode="updates")  # pyright: ignore
        steps = [list(chunk) async for chunk in stream]
        assert steps == [["start"], ["generate"], ["critique"], ["finish"]]
        state = await loop.graph.aget_state(config)  # pyright: ignore
        assert state.values["run_id"] == "t.2"
        assert state.values["options"]["seed"] != out["options"]["seed"]


async def test_a_parent_graph_may_have_a_context_of_its_own(tmp_path):
    async with make(tmp_path, rounds=1, images=1) as loop:
        parent = StateGraph(State, context_schema=dict)  # pyright: ignore[reportArgumentType]
        parent.add_node("loop", loop.graph)
        parent.add_edge(START, "loop")
        begin = {"prompt": "a dog", "target": {"valence": 1.0}}
        out = await parent.compile().ainvoke(begin, context={"user": "ann"})  # pyright: ignore
        assert out["status"] == "completed"


async def test_the_graph_reviews_by_interrupt(tmp_path):
    async with make(tmp_path, rounds=2) as loop:
        config = {"configurable": {"thread_id": "t"}}
        begin = {"prompt": "a dog", "target": {"valence": 2}, "seed": 1}
        out = await loop.graph.ainvoke(begin, config, context={"review": True})  # pyright: ignore
        assert out["__interrupt__"][0].value["round"] == 0
        out = await loop.graph.ainvoke(Command(resume="brighter"), config)  # pyright: ignore
        assert (out["status"], len(out["rounds"])) == ("completed", 2)


async def test_a_wrong_request_to_the_graph_is_one_error(tmp_path):
    async with make(tmp_path) as loop:
        with pytest.raises(UserError, match="valence 9"):
            await loop.graph.ainvoke(
                {"prompt": "a", "target": {"valence": 9}}, {"configurable": {"thread_id": "t"}}
            )  # pyright: ignore
        assert loop.recorder.store.runs() == []


async def test_a_long_run_keeps_its_state_small(tmp_path):
    long = "x" * 390
    answer = critic_answer(0, 0, analysis=long, suggestion=long[:200])
    rewrite = json.dumps({"why": long[:300], "changes": long[:200], "prompt": f"a dog {long}"[:400]})
    model = Scripted(fail=lambda role, n: answer if role == "critic" else rewrite)
    async with make(tmp_path, model=model, rounds=10, images=8, patience=50) as loop:
        result = await loop.run("a dog", TARGET, seed=7, run_id="long")
        assert len(result.rounds) == 10
    with sqlite3.connect(tmp_path / "home" / "checkpoints.db") as db:
        [size] = db.execute(
            "select (select sum(length(checkpoint) + length(metadata)) from checkpoints where thread_id = 'long')"
            " + (select coalesce(sum(length(value)), 0) from writes where thread_id = 'long')"
        ).fetchone()
    assert size < 1_000_000
    print(f"state of 10 rounds of 8 images: {size / 1000:.0f} kB")


# ---- without asyncio


def test_sync(tmp_path):
    with make(tmp_path) as loop:
        result = loop.run_sync("a dog", TARGET, seed=7)
        assert loop.resume_sync(result.run_id) == result
        state = loop.graph.get_state({"configurable": {"thread_id": result.run_id}})
        assert state.values["status"] == "completed"
        with pytest.raises(UserError, match="empty"):
            loop.run_sync("", TARGET)
    with pytest.raises(RuntimeError, match="not open"):
        loop.run_sync("a dog", TARGET)


async def test_sync_inside_asyncio_says_what_to_do(tmp_path):
    async with make(tmp_path) as loop:
        with pytest.raises(RuntimeError, match="await loop"):
            loop.run_sync("a dog", TARGET)
        result = await asyncio.to_thread(loop.run_sync, "a dog", TARGET, seed=7)
        assert result.status is RunStatus.COMPLETED


# ---- opening


def test_a_graph_of_a_loop_that_is_not_open_says_what_to_do(tmp_path):
    loop = make(tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"not open: use `async with open_loop\(\) as loop`"):
            _ = loop.graph
        with loop:
            assert loop.graph.name == "emoloop"


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="rouns"):
        open_loop(loop={"rouns": 2})
    with pytest.raises(UserError, match="hmoe"):
        open_loop(hmoe=str(tmp_path))


async def test_an_unwritable_home_is_found_before_models_load(tmp_path):
    (tmp_path / "file").write_text("x")

    loop = open_loop(generator=str(tmp_path / "no-model"), home=str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="cannot write to home"):
        await loop.__aenter__()


async def test_a_model_that_is_not_there_leaves_nothing(tmp_path):
    loop = open_loop(generator=str(tmp_path / "no-model"), lvlm=Scripted(), home=str(tmp_path / "home"))
    with pytest.raises(UserError, match="no-model"):
        await loop.__aenter__()
    assert not (tmp_path / "home").exists()


async def test_several_samples_need_a_temperature(tmp_path):
    loop = open_loop(generator=Painter(), lvlm={"samples": 3}, home=str(tmp_path / "home"))
    with pytest.raises(UserError, match="samples"):
        await loop.__aenter__()
    assert not (tmp_path / "home").exists()


async def test_a_run_may_begin_with_a_rewrite_and_use_all_its_rounds(tmp_path):
    model = Scripted()
    async with make(tmp_path, model=model) as loop:
        options = {"rounds": 3, "patience": 1, "tolerance": 3.0, "exhaust": True}
        kept = await loop.run("a dog", TARGET, seed=7, rewriter="keep", **options)
        assert [round.prompt for round in kept.rounds] == ["a dog"] * 3
        assert kept.stop_reason is StopReason.ROUNDS_USED and "rewriter" not in model.calls
        first = await loop.run("a dog", TARGET, seed=7, rewriter="one_shot", rewrite_first=True, **options)
        assert len({round.prompt for round in first.rounds}) == 1 and first.rounds[0].prompt != "a dog"
        assert model.calls["rewriter"] == 1 and len(first.rounds) == 3
        rewards = [c.reward for round in first.rounds for c in round.candidates]
        assert first.best is not None and first.best.reward == max(rewards)
        with pytest.raises(UserError, match="unknown rewriter"):
            await loop.run("a dog", TARGET, rewriter="nobody")


async def test_a_reward_may_be_async_and_its_failure_is_named(tmp_path):
    async def half(critique, target):
        await asyncio.sleep(0)
        return 0.5

    async def broken(critique, target):
        raise ValueError("the service is away")

    for number, (reward, value) in enumerate(((half, 0.5), (broken, None))):
        home = str(tmp_path / str(number))
        loop = open_loop(
            generator=Painter(), lvlm=Scripted(), reward=reward, home=home, loop={"images": 2, "rounds": 1}
        )
        async with loop:
            result = await loop.run("a dog", TARGET, seed=7)
        assert [c.reward for c in result.rounds[0].candidates] == [value, value]
    assert result.stop_reason is StopReason.NO_REWARD
    assert "the service is away" in result.warnings[-1] and "critique" not in result.warnings[-1]


def test_a_function_is_no_lvlm_and_that_is_said_before_any_model_is_loaded(tmp_path):
    def answer(messages: object) -> str:
        return "{}"

    model: Any = answer
    with pytest.raises(UserError, match="is no LangChain chat model"):
        open_loop(lvlm=model, home=str(tmp_path))
    with pytest.raises(UserError, match="is no LangChain chat model"):
        emoloop.rewrite("a dog", TARGET, lvlm=model)


def test_a_loop_is_entered_once(tmp_path):
    loop = open_loop(
        generator=Painter(), lvlm=Scripted(), home=str(tmp_path), loop={"rounds": 1, "images": 1}
    )
    with loop:
        with pytest.raises(RuntimeError, match="open already"), loop:
            pass
        assert loop.run_sync("a dog", TARGET, seed=7).status is RunStatus.COMPLETED
    with loop:
        assert loop.run_sync("a cat", TARGET, seed=7).status is RunStatus.COMPLETED


async def test_a_damaged_file_of_states_is_set_aside(tmp_path):
    async with make(tmp_path, rounds=1) as loop:
        first = await loop.run("a dog", TARGET, seed=7)
    for junk in (b"not a database at all" * 400, b"SQLite format 3\0" + b"\xff" * 5000):
        (tmp_path / "home" / "checkpoints.db").write_bytes(junk)
        async with make(tmp_path, rounds=1) as loop:
            assert await loop.resume(first.run_id) == first
            assert (await loop.run("a cat", TARGET, seed=7)).status is RunStatus.COMPLETED
    assert len(list((tmp_path / "home").glob("checkpoints.db.damaged-*"))) == 2


async def test_saved_states_make_no_foreign_objects(tmp_path):
    crafted = JsonPlusSerializer(allowed_msgpack_modules=True).dumps_typed(RunStarted(
        run_id="r", prompt="p", target=TARGET, seed=1
    ))  # fmt: skip
    assert isinstance(JsonPlusSerializer(allowed_msgpack_modules=True).loads_typed(crafted), RunStarted)
    async with make(tmp_path, rounds=1) as loop:
        serde = loop.graph.checkpointer.serde  # pyright: ignore
        assert not isinstance(serde.loads_typed(crafted), RunStarted)
        with pytest.raises(NotImplementedError):
            serde.loads_typed(("pickle", b"cos\nsystem\n(S'true'\ntR."))


async def test_one_run_is_worked_on_by_one_at_a_time(tmp_path):
    async with make(tmp_path, painter=Painter(delay=0.01)) as loop:
        calls = (loop.run("a dog", TARGET, seed=7, run_id="mine") for _ in range(3))
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [it for it in results if isinstance(it, UserError)]
        assert len(refused) == 2 and "is being worked on" in str(refused[0])
        assert len(loop.parts.generator.requests) == 9  # pyright: ignore


async def test_a_lost_picture_is_made_again(tmp_path):
    async with make(tmp_path, model=Scripted(fail=lambda role, number: DOWN), rounds=1) as loop:
        failed = await loop.run("a dog", TARGET, seed=7, run_id="mine")
        path = failed.rounds[0].candidates[0].path
    assert path is not None
    whole = path.read_bytes()
    for harm in (path.unlink, lambda: path.write_bytes(whole[:20])):
        harm()
        async with make(tmp_path, rounds=1) as loop:
            assert (await loop.resume("mine")).status is RunStatus.COMPLETED
        assert path.read_bytes() == whole
        break
