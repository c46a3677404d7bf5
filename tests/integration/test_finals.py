"""The final round: over a real log, checkpoints and graph; generator and chat model follow simple rules."""

from statistics import fmean
from typing import Any

import pytest
from emoloop.domain import Critique, EmotionTarget, Missing, RunStatus, StopReason
from emoloop.events import Critiqued, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from emoloop.graph.loop import Loop, open_loop
from emoloop.traces.document import result_json
from emoloop.traces.final import unselected
from emoloop.traces.fold import Fold
from emoloop.traces.genai import workflow
from painter import Painter
from scripted import Scripted

TARGET = EmotionTarget(valence=2, arousal=-1)


def make(tmp_path, painter: Painter | None = None, model: Scripted | None = None, **options: Any) -> Loop:
    loop = {"rounds": 2, "images": 4, "proposals": 4, "patience": 3, "finalists": 2, "tolerance": 0.0}
    return open_loop(
        generator=painter or Painter(),
        lvlm=model or Scripted(),
        home=str(tmp_path / "home"),
        loop={**loop, "rewriter": "scripted:Own", **options},
    )


async def test_the_best_prompts_are_painted_and_read_twice_more(tmp_path):
    async with make(tmp_path) as loop:
        plain = await loop.run("a dog", TARGET, seed=7, finalists=0)
        result = await loop.run("a dog", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
        row = loop.recorder.store.runs()[0]
    assert result.rounds[:2] == plain.rounds and len(plain.rounds) == 2 and plain.estimate is None
    assert result.stop_reason is plain.stop_reason is StopReason.ROUNDS_USED
    ranked = sorted((c for r in plain.rounds for c in r.candidates), key=lambda c: -(c.reward or 0))
    final = result.rounds[2]
    prompts = [ranked[0].prompt, ranked[1].prompt]
    assert final.final and not any(r.final for r in result.rounds[:2])
    assert [it.prompt for it in final.proposals] == prompts
    assert [c.prompt for c in final.candidates] == prompts * 2
    seeds = {c.seed for r in result.rounds for c in r.candidates}
    assert len(seeds) == 12
    # The winner has the highest mean of the picture that made its prompt a finalist and the first one more.
    means = [
        fmean([before.reward, again.reward])
        for before, again in zip(ranked, final.candidates[:2], strict=False)
    ]
    winner = means.index(max(means))
    best = result.best
    assert best is not None and best.prompt == prompts[winner] == row.best_prompt
    assert best.reward == max(ranked[winner].reward, final.candidates[winner].reward) == row.best_reward
    # What is promised was read from the second one.
    told = final.candidates[2 + winner]
    assert result.estimate == told.critique and result.estimate != best.critique
    unaided = plain.rounds[0].candidates[0].reward
    assert result.gain == pytest.approx(told.reward - unaided) == row.gain
    finished = events[-1]
    assert isinstance(finished, RunFinished) and finished.estimate == result.estimate
    assert workflow(events)["emoloop.estimate.valence"] == result.estimate.valence
    assert result_json(result)["best"]["estimate"]["valence"] == result.estimate.valence
    assert result_json(plain)["best"]["estimate"]["valence"] == plain.best.critique.valence


async def test_it_goes_on_where_it_broke_off(tmp_path):
    async with make(tmp_path) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)
        whole = await loop.recorder.events(undisturbed.run_id)
    first = next(e.seq for e in whole if e.node == "final")
    for stop_at in range(first - 1, len(whole) - 1, 2):
        painter, run_id, count = Painter(), f"broken-{stop_at}", 0
        async with make(tmp_path, painter) as loop:
            events: Any = loop.stream("a dog", TARGET, seed=7, run_id=run_id)
            async for _ in events:
                count += 1
                if count == stop_at:
                    break
            await events.aclose()
        async with make(tmp_path, painter) as loop:
            result = await loop.resume(run_id)
            after = await loop.recorder.events(run_id)
        assert result.model_dump(exclude={"run_id", "home"}) == undisturbed.model_dump(
            exclude={"run_id", "home"}
        )
        assert sorted(e.key[1:] for e in after) == sorted(e.key[1:] for e in whole)


async def test_the_log_alone_is_enough_to_go_on(tmp_path):
    async with make(tmp_path) as loop:
        undisturbed = await loop.run("a dog", TARGET, seed=7)
        log = await loop.recorder.events(undisturbed.run_id)
    half = next(i for i, e in enumerate(log) if e.round == 2 and isinstance(e, Critiqued))
    async with make(tmp_path / "elsewhere") as loop:
        for event in log:
            if isinstance(event, ImageGenerated):
                path = undisturbed.home / "blobs" / event.sha256[:2] / f"{event.sha256}.png"
                loop.recorder.store.blobs.put_bytes(path.read_bytes(), "png")
        await loop.recorder.record(*(e.model_copy(update={"seq": -1}) for e in log[: half + 1]))
        result = await loop.resume(undisturbed.run_id)
    assert result.model_dump(exclude={"rounds", "best", "home"}) == undisturbed.model_dump(
        exclude={"rounds", "best", "home"}
    )
    assert result.best.sha256 == undisturbed.best.sha256


async def test_a_final_round_that_cannot_be_painted_costs_nothing_but_the_estimate(tmp_path):
    painter = Painter(fail=lambda number: RuntimeError("out of paint") if number >= 8 else None)
    async with make(tmp_path, painter) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.status is RunStatus.COMPLETED and result.stop_reason is StopReason.ROUNDS_USED
    assert result.estimate is None and result.best is not None and result.best.round < 2
    assert any("round 2: no image could be made" in warning for warning in result.warnings)


async def test_a_run_that_reads_nothing_has_no_final_round(tmp_path):
    model = Scripted(fail=lambda role, number: "no idea" if role == "critic" else None)
    async with make(tmp_path, model=model) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert result.status is RunStatus.FAILED and len(result.rounds) == 1


async def test_the_budget_has_room_for_the_final_round(tmp_path):
    async with make(tmp_path, rounds=9) as loop:
        result = await loop.run("a dog", TARGET, seed=7, max_images=12)
    assert [len(r.candidates) for r in result.rounds] == [4, 4, 4] and result.rounds[2].final
    assert result.stop_reason is StopReason.BUDGET_USED
    async with make(tmp_path, rounds=9) as loop:
        counts = {}
        for most in (4, 5, 7):
            result = await loop.run("a dog", TARGET, seed=7, max_images=most)
            counts[most] = [len(r.candidates) for r in result.rounds]
    assert counts == {4: [4], 5: [4], 7: [4, 2]}


def told(*rewards: tuple[str, int, int, float | None], prompts: tuple[str, ...] = ("one", "two")) -> Fold:
    """A fold of (prompt, round, index, reward), in that order, with a final round 1 of these prompts."""
    head = {"run_id": "r", "model": "m"}
    fold = Fold("r", [RunStarted(run_id="r", prompt="one", target=TARGET, seed=1)])
    for index, prompt in enumerate(prompts):
        fold.apply(
            Rewritten(**head, round=1, index=index, node="final", prompt=prompt, prompt_version="final")
        )
    for prompt, round, index, value in rewards:
        place = {"run_id": "r", "round": round, "index": index, "sha256": "0" * 64}
        read = {"prompt_version": "v", "critique": Missing(reason="no")}
        if value is not None:
            read["critique"] = Critique(valence=value, arousal=0, alignment=1)
        fold.apply(ImageGenerated(**place, model="m", prompt=prompt, seed=0, height=8, width=8))
        fold.apply(Critiqued(**place, model="m", **read))
        fold.apply(Rewarded(**place, name="n", version="1", value=value, reason=None if value else "no"))
    return fold


A, B = ("one", 0, 0, 0.9), ("two", 0, 1, 0.8)


@pytest.mark.parametrize(
    ("final", "best", "valence"),
    [
        ([("one", 1, 0, 0.1), ("two", 1, 1, 0.6), ("one", 1, 2, 0.3), ("two", 1, 3, 0.5)], (0, 1), 0.5),
        ([("one", 1, 0, 0.1), ("two", 1, 1, 0.9), ("one", 1, 2, 0.3), ("two", 1, 3, 0.5)], (1, 1), 0.5),
        # What gives the estimate does not choose, however good.
        ([("one", 1, 0, 0.8), ("two", 1, 1, 0.8), ("one", 1, 2, 0.1), ("two", 1, 3, 2.0)], (0, 0), 0.1),
        # A missing one is none: the prompt stands by what is known.
        ([("one", 1, 0, None), ("two", 1, 1, 0.8), ("one", 1, 2, None)], (0, 0), None),
    ],
)
def test_who_wins(final, best, valence):
    for order in (final, final[::-1]):
        fold = told(A, B, *order)
        assert fold.final == 1 and fold.best == best
        assert (fold.estimate.valence if fold.estimate else None) == valence
    assert unselected(told(A, B)) is None and told(A, B).best == (0, 0)
