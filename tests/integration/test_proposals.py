"""A round of several prompts: over a real log, checkpoints and graph; generator and chat model follow simple rules."""

import io
import json
from collections import Counter
from typing import Any

import pytest
from emoloop.agents.rewriters import Rewrite, RewriteRequest, propose
from emoloop.agents.rewriters.simple import SimpleRewriter
from emoloop.cli.traces_view import show_run
from emoloop.cli.view import RunView
from emoloop.domain import EmotionTarget, RunStatus, StopReason
from emoloop.events import ImageGenerated, Rewritten, RunStarted
from emoloop.graph import build, retry
from emoloop.graph.loop import Loop, open_loop
from emoloop.rl.config import DataConfig
from emoloop.rl.data.chats import rewriter_turns
from emoloop.rl.data.dataset import Dataset
from emoloop.rl.rollouts import LogRollouts
from emoloop.tools.images.sheet import draw_sheet
from emoloop.traces.document import result_json
from emoloop.traces.fold import fold
from painter import Painter
from rich.console import Console
from scripted import Own, Scripted

TARGET = EmotionTarget(valence=2, arousal=-1)


class Inventive(Scripted):
    """Rewrites each call in other words, whatever it is asked; at first some of its answers are one and the same."""

    repeats: int = 0

    def _rewrite(self, messages: Any) -> str:
        number = self.calls["rewriter"] - 1
        adjective = ("bright", "dark", "red", "calm")[number % 4]
        where = f"{adjective} {number}" if number >= self.repeats else "bright"
        return json.dumps({"why": "because", "changes": adjective, "prompt": f"a dog {where}"})


class Stubborn(Own):
    def says(self, neutral: str, seed: int) -> str:
        return f"bright {neutral}" if seed % 2 else f"{neutral}, BRIGHT"


def make(tmp_path, *, painter: Painter | None = None, model: Scripted | None = None, **options) -> Loop:
    return open_loop(
        generator=painter or Painter(),
        lvlm={"rewriter_prompt": "rewriter-compact"} if model is None else model,
        home=str(tmp_path / "home"),
        loop={
            "rounds": 3,
            "images": 4,
            "proposals": 4,
            "patience": 3,
            "rewriter": "scripted:Own",
            **options,
        },
    )


def scripted(tmp_path, **options) -> Loop:
    return make(tmp_path, model=Scripted(), **options)


def essence(result) -> dict:
    return result.model_dump(exclude={"run_id": True, "home": True})


def painted(events, number: int) -> list[str]:
    made = [e for e in events if isinstance(e, ImageGenerated) and e.round == number]
    return [e.prompt for e in sorted(made, key=lambda e: e.index)]


def written(events, number: int) -> list[tuple[int, str]]:
    return [(e.index, e.prompt) for e in events if isinstance(e, Rewritten) and e.round == number]


async def test_each_image_has_its_own_prompt_and_round_0_keeps_the_neutral_one(tmp_path):
    async with scripted(tmp_path) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
        row = loop.recorder.store.runs()[0]
    assert [index for index, _ in written(events, 0)] == [1, 2, 3]
    assert painted(events, 0) == ["a dog", *(prompt for _, prompt in written(events, 0))]
    for number in (1, 2):
        assert [index for index, _ in written(events, number)] == [0, 1, 2, 3]
        assert painted(events, number) == [prompt for _, prompt in written(events, number)]
    prompts = [prompt for number in range(3) for prompt in painted(events, number)]
    assert len(set(prompts)) == len(prompts) == 12
    assert [c.prompt for round in result.rounds for c in round.candidates] == prompts
    assert [len(round.proposals) for round in result.rounds] == [4, 4, 4]
    assert [round.prompt for round in result.rounds] == [painted(events, n)[0] for n in range(3)]
    best = result.best
    assert best is not None and best.reward is not None and row.best_prompt == best.prompt
    unaided = result.rounds[0].candidates[0]
    assert unaided.prompt == "a dog" and unaided.reward is not None
    assert result.gain == pytest.approx(best.reward - unaided.reward) == row.gain
    document = result_json(result)
    assert [it["prompt"] for it in document["rounds"][1]["candidates"]] == painted(events, 1)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"neutral_images": 2}, {"a dog": 2}),
        ({"proposals": 3}, {"a dog": 1}),
        ({"proposals": 1}, {"a dog": 4}),
        ({"neutral_images": 4}, {"a dog": 4}),
        ({"rewrite_first": True}, {}),
    ],
)
async def test_how_round_0_is_shared_out(tmp_path, options, first):
    async with scripted(tmp_path, rounds=2, **options) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    count = Counter(c.prompt for c in result.rounds[0].candidates)
    assert sum(count.values()) == 4
    assert count["a dog"] == first.get("a dog", 0)
    assert len({c.prompt for c in result.rounds[1].candidates}) == options.get("proposals", 4)


async def test_one_proposal_is_one_prompt_with_several_seeds(tmp_path):
    async with scripted(tmp_path, proposals=1) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    assert [len(set(painted(events, n))) for n in range(3)] == [1, 1, 1]
    assert [index for n in range(3) for index, _ in written(events, n)] == [0, 0]


async def test_the_default_is_half_as_many_as_images_and_one_for_a_rewriter_that_has_one(tmp_path):
    async with scripted(tmp_path, proposals=None, rounds=1) as loop:
        counted = {}
        for name, options in {"half": {}, "keep": {"rewriter": "keep"}, "more": {"proposals": 9}}.items():
            result = await loop.run("a dog", TARGET, seed=7, **options)
            started = (await loop.recorder.events(result.run_id))[0]
            assert isinstance(started, RunStarted)
            counted[name] = started.settings["loop"]["proposals"]
    assert counted == {"half": 2, "keep": 1, "more": 4}


# ---- breaking off and going on


async def test_it_goes_on_where_it_broke_off(tmp_path):
    async with scripted(tmp_path) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)
        whole = await loop.recorder.events(undisturbed.run_id)
    for stop_at in (2, 3, 4, 9, 16, 18, 20, 26, 33):
        painter, count, run_id = Painter(), 0, f"broken-{stop_at}"
        async with make(tmp_path, painter=painter, model=Scripted()) as loop:
            events: Any = loop.stream("a dog", TARGET, seed=7, run_id=run_id)
            async for _ in events:
                count += 1
                if count == stop_at:
                    break
            await events.aclose()
        async with make(tmp_path, painter=painter, model=Scripted()) as loop:
            result = await loop.resume(run_id)
            after = await loop.recorder.events(run_id)
        assert essence(result) == essence(undisturbed)
        assert sorted(e.key[1:] for e in after) == sorted(e.key[1:] for e in whole)
        assert len(painter.requests) <= 12 + 4


async def test_a_kill_while_the_rewriter_is_asked_leaves_none_of_its_prompts(tmp_path):
    class Slow(Own):
        calls = 0

        async def rewrite(self, request: RewriteRequest) -> Rewrite:
            Slow.calls += 1
            if Slow.calls == 6:
                raise KeyError("killed")
            return await super().rewrite(request)

    async with scripted(tmp_path) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)
    async with scripted(tmp_path) as loop:
        loop.parts.rewriter = lambda name: Slow(None, "")
        with pytest.raises(KeyError, match="killed"):
            await loop.run("a dog", TARGET, seed=7, run_id="mine")
        assert written(await loop.recorder.events("mine"), 1) == []
        result = await loop.resume("mine")
    assert essence(result) == essence(undisturbed)


async def test_a_run_from_before_goes_on_with_one_prompt_a_round(tmp_path):
    async with scripted(tmp_path, proposals=1) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)
        log = await loop.recorder.events(undisturbed.run_id)
    old = {
        "rounds": 3,
        "images": 4,
        "tolerance": 0.2,
        "patience": 3,
        "review": False,
        "rewriter": "scripted:Own",
    }
    begun = [
        event.model_copy(
            update={"run_id": "old", "seq": -1, **({"settings": {"loop": old}} if not event.seq else {})}
        )
        for event in log[:8]
    ]
    async with scripted(tmp_path, proposals=4) as loop:
        await loop.recorder.record(*begun)
        result = await loop.resume("old")
    assert essence(result) == essence(undisturbed)


# ---- duplicates, refusals, failures


async def test_near_duplicates_are_asked_for_again(tmp_path):
    model = Inventive(repeats=3)
    rewriter = SimpleRewriter(model, "rewriter-compact")
    found = await propose(rewriter, RewriteRequest("a dog", TARGET, count=4))
    assert [it.prompt for it in found] == ["a dog bright", "a dog calm 3", "a dog bright 4", "a dog dark 5"]
    assert [it.number for it in found] == [0, 3, 4, 5]
    assert sum(it.usage["input_tokens"] for it in found) == 60 and model.calls["rewriter"] == 6
    assert sum(it.usage.get("calls", 1) for it in found) == 6
    assert not any(it.notes for it in found)


async def test_too_few_different_prompts_are_shown_more_often_with_a_warning(tmp_path):
    async with scripted(tmp_path, rewriter=f"{__name__}:Stubborn") as loop:
        result = await loop.run("a dog", TARGET, seed=7, rounds=2)
    first, second = (Counter(c.prompt for c in round.candidates) for round in result.rounds)
    assert sorted(first.values()) == [1, 3] and first["a dog"] == 1
    assert list(second.values()) == [4], "what was tried is painted again where there is nothing else"
    assert result.warnings[:1] == ["round 0: the rewriter gave 1 new prompts where 3 were wanted"]


async def test_a_refused_answer_gives_way_to_the_others(tmp_path):
    fail = lambda role, number: "sorry" if role == "rewriter" and number in (0, 1) else None  # noqa: E731
    found = await propose(
        SimpleRewriter(Inventive(fail=fail), "rewriter-compact"), RewriteRequest("a dog", TARGET, count=3)
    )
    assert len({it.prompt for it in found}) == 3 and not any(it.refused for it in found)


async def test_a_rewriter_that_is_down_costs_a_warning(tmp_path, monkeypatch):
    policy = retry.retry_policy()._replace(initial_interval=0.001, jitter=False)
    monkeypatch.setattr(build, "retry_policy", lambda: policy)
    down = ConnectionError("the server is away")
    model = Scripted(fail=lambda role, number: down if role == "rewriter" else None)
    async with make(tmp_path, model=model, rewriter="simple") as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.status is RunStatus.COMPLETED
    assert {c.prompt for round in result.rounds for c in round.candidates} == {"a dog"}
    assert result.warnings[0] == "round 0: kept the best prompt so far: ConnectionError: the server is away"


# ---- several in one answer


class Lister(Scripted):
    def _rewrite(self, messages: Any) -> str:
        number = self.calls["rewriter"]
        prompts = [{"changes": "light", "prompt": f"a dog {number} {word}"} for word in ("bright", "dark")]
        return json.dumps({"why": "because", "prompts": [*prompts, f"a red dog {number}"]})


async def test_a_general_model_gives_several_in_one_answer(tmp_path):
    model = Lister()
    async with make(tmp_path, model=model, rewriter="simple", rounds=2) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    rewrites = [e for e in events if isinstance(e, Rewritten)]
    assert {e.prompt_version for e in rewrites} == {"proposals@1"}
    assert [c.prompt for c in result.rounds[0].candidates][1:] == [
        "a dog 1 bright",
        "a dog 1 dark",
        "a red dog 1",
    ]
    assert len({c.prompt for c in result.rounds[1].candidates}) == 4
    # Round 1 wants four, an answer gives three: it is asked once more, and each answer is paid for once.
    assert model.calls["rewriter"] == 3
    assert sum(e.usage.get("total_tokens", 0) for e in rewrites) == 45
    told = next(
        str(messages[-1].content) for messages in model.seen if "Write 4" in str(messages[-1].content)
    )
    assert "Tried in round 0: a dog 1 bright" in told and "Suggested: more light" in told


async def test_a_history_is_bounded_and_tells_what_matters():
    from emoloop.agents.rewriters import history
    from emoloop.domain import Candidate, Critique, Round

    def one(number: int, index: int, valence: float, arousal: float) -> Candidate:
        read = Critique(valence=valence, arousal=arousal, alignment=1.0)
        reward = 1 - (abs(valence - 2) + abs(arousal + 1)) / 6
        place = {"round": number, "index": index, "prompt": f"p{number}{index}", "sha256": "0" * 64}
        return Candidate(**place, seed=0, critique=read, reward=reward)

    rounds = [
        Round(prompt="p00", candidates=[one(n, i, (i - 4) / 2, (n - 3) / 2) for i in range(8)])
        for n in range(6)
    ]
    told = history.telling("p00", rounds, TARGET)
    prompts = [it["prompt"] for it in told]
    assert len(prompts) == history.LONGEST and prompts[0] == "p00"
    assert {"p17", "p50"} <= set(prompts), "the nearest on both axes and the worst"
    parents = [history.lineage("p00", rounds, number)[-1]["prompt"] for number in range(8)]
    assert parents[:4] == parents[4:] and len(set(parents)) == 4 and parents[0] == "p17"
    assert history.lineage("p00", rounds, 0)[0]["prompt"] == "p00"


async def test_a_ranker_chooses_what_is_painted():
    def longest(prompts):
        return sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))

    rewriter = SimpleRewriter(Inventive(), "rewriter-compact")
    found = await propose(rewriter, RewriteRequest("a dog", TARGET, count=2, spare=4, rank=longest))
    assert [it.prompt for it in found] == ["a dog bright 0", "a dog bright 4"]
    assert found[0].usage["calls"] == 5, "what was asked and not painted is paid for too"


# ---- people


async def test_a_persons_prompt_stands_in_place_of_all(tmp_path):
    answers = iter([{"prompt": "a red house"}, "more sun"])
    async with scripted(tmp_path, review=True) as loop:
        result = await loop.run("a dog", TARGET, seed=7, reviewer=lambda review: next(answers))
        events = await loop.recorder.events(result.run_id)
    assert painted(events, 1) == ["a red house"] * 4
    assert len(set(painted(events, 2))) == 4


@pytest.mark.parametrize("number", [0, 1])
async def test_an_edit_before_painting_stands_in_place_of_all(tmp_path, number):
    async with scripted(tmp_path, rounds=2) as loop:
        graph, where = loop.graph, {"configurable": {"thread_id": "t"}}
        begin: Any = {"prompt": "a dog", "target": {"valence": 2}, "seed": 1}
        for step in [begin, None][: number + 1]:
            await graph.ainvoke(step, where, interrupt_before=["generate"])  # pyright: ignore
        await graph.aupdate_state(where, {"current": "a red house"})  # pyright: ignore
        out = await graph.ainvoke(None, where)  # pyright: ignore
        events = await loop.recorder.events("t")
        assert painted(events, number) == ["a red house"] * 4
        assert len(set(painted(events, 1 - number))) == 4
        assert out["rounds"][number]["prompt"] == "a red house"
        result = await loop.recorder.result("t")
        assert [it.prompt for it in result.rounds[number].proposals] == ["a red house"]


async def test_a_fork_has_its_parents_prompts_up_to_the_edit(tmp_path):
    async with scripted(tmp_path) as loop:
        where: Any = {"configurable": {"thread_id": "t"}}
        await loop.graph.ainvoke({"prompt": "a dog", "target": {"valence": 2}, "seed": 1}, where)  # pyright: ignore
        before = await loop.recorder.events("t")
        history = loop.graph.aget_state_history(where)
        [found] = [it async for it in history if it.next == ("generate",) and it.values["round"] == 1]
        edited: Any = await loop.graph.aupdate_state(found.config, {"current": "a red house"})
        out = await loop.graph.ainvoke(None, edited)  # pyright: ignore
        events = await loop.recorder.events(out["run_id"])
    assert out["run_id"] != "t" and painted(events, 0) == painted(before, 0)
    assert painted(events, 1) == ["a red house"] * 4 and len(set(painted(events, 2))) == 4
    assert fold(events).rounds[0].proposals == fold(before).rounds[0].proposals


# ---- who reads the log


def said(messages: Any) -> str:
    parts = [part for it in messages for part in (it["content"] if isinstance(it, dict) else it.content)]
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


@pytest.mark.parametrize("model", [Inventive(repeats=2), Lister()])
async def test_a_rewriters_questions_are_made_again(tmp_path, model):
    loop = make(tmp_path, model=model, rewriter="simple", proposals=3)
    if isinstance(model, Inventive):
        loop.settings.lvlm.rewriter_prompt = "rewriter-compact"
    async with loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    turns = list(rewriter_turns(result, events))
    asked = {said(it) for it in model.seen if not any(isinstance(part, dict) and "image_url" in part
                                                       for part in it[-1].content)}  # fmt: skip
    assert turns and {said(turn.question) for turn in turns} <= asked
    rewrites = [e for e in events if isinstance(e, Rewritten)]
    assert len(turns) == (3 if isinstance(model, Lister) else len(rewrites))
    for turn in turns:
        for answer in turn.good:
            told = json.loads(answer)
            prompts = [it["prompt"] for it in told.get("prompts", [told])]
            assert set(prompts) <= {e.prompt for e in rewrites}


async def test_examples_are_of_a_prompt_each(tmp_path):
    async with scripted(tmp_path, images=6, proposals=3, neutral_images=2) as loop:
        for seed in range(3):
            await loop.run("a dog", TARGET, seed=seed)
        store = loop.recorder.store
        config = DataConfig(held_out=0, min_gain=-9, gate="all")
        dataset = Dataset(LogRollouts(store), config)
        results = {row.run_id: store.run(row.run_id) for row in store.runs()}
        examples = dataset.examples("pairs").fetch(range(len(dataset.examples("pairs"))))
    means: dict[tuple[str, str], list[float]] = {}
    for result in results.values():
        for it in (it for round in result.rounds for it in round.candidates):
            means.setdefault((result.run_id, it.prompt), []).append(it.reward or 0.0)
    rewritten = [key for key in means if key[1] != "a dog"]
    assert sorted((it.run_id, it.refined) for it in examples) == sorted(rewritten)
    for it in examples:
        own, unaided = (sum(values) / len(values) for values in
                        (means[it.run_id, str(it.refined)], means[it.run_id, "a dog"]))  # fmt: skip
        assert it.advantage == pytest.approx(own - unaided, abs=1e-6)
        shown = [c for round in results[it.run_id].rounds for c in round.candidates if c.sha256 == it.image]
        assert [c.prompt for c in shown] == [it.refined]


async def test_a_person_sees_each_prompt(tmp_path):
    async with scripted(tmp_path, rounds=2) as loop:
        file = io.StringIO()
        with RunView(Console(file=file, width=200)) as view:
            result = await loop.run("a dog", TARGET, seed=7, on_event=view)
        show_run(Console(file=file, width=200), result)
    prompts = {c.prompt for round in result.rounds for c in round.candidates}
    text = file.getvalue()
    assert len(prompts) == 8 and all(text.count(prompt) >= 2 for prompt in prompts)
    assert draw_sheet(result).height > 0


# ---- budget


@pytest.mark.parametrize(
    ("budget", "images"),
    [({"max_images": 9}, 8), ({"max_images": 3}, 3), ({"max_calls": 5}, 8), ({"max_seconds": 1e-9}, 4)],
)
@pytest.mark.parametrize("exhaust", [False, True])
async def test_a_budget_ends_the_run(tmp_path, budget, images, exhaust):
    async with scripted(tmp_path, rounds=9, exhaust=exhaust, patience=9) as loop:
        result = await loop.run("a dog", TARGET, seed=7, **budget)
    assert (result.status, result.stop_reason) == (RunStatus.COMPLETED, StopReason.BUDGET_USED)
    assert sum(len(round.candidates) for round in result.rounds) == images


# ---- the embedded models


async def test_the_miniature_proposes_a_prompt_for_each_image(tmp_path):
    async with open_loop(home=str(tmp_path), loop={"rounds": 2, "images": 4, "exhaust": True}) as loop:
        result = await loop.run("a dog by the sea", TARGET, seed=3)
        events = await loop.recorder.events(result.run_id)
        again = await loop.run("a dog by the sea", TARGET, seed=3)
    assert result.warnings == []
    prompts = [c.prompt for round in result.rounds for c in round.candidates]
    assert prompts[0] == "a dog by the sea" and len(set(prompts)) == 8
    assert all(prompt.startswith("a dog by the sea") for prompt in prompts)
    assert {e.prompt_version for e in events if isinstance(e, Rewritten)} == {"rewriter-compact@1"}
    assert essence(again) == essence(result)
