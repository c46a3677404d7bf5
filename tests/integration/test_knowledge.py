"""What other runs know, given to a run: over a real log and graph; generator and chat model follow simple rules."""

import json
from pathlib import Path
from typing import Any

import pytest
from emoloop.agents.rewriters import RewriteRequest, propose
from emoloop.agents.rewriters.simple import SimpleRewriter
from emoloop.domain import EmotionTarget, Example
from emoloop.events import ImageGenerated, Rewritten
from emoloop.graph.knowledge import Knowledge
from emoloop.graph.loop import Loop, open_loop
from emoloop.tools.words import WordModel
from emoloop.traces.store import open_store
from painter import Painter
from rl_log import run_events, settings_for
from scripted import Own, Scripted

TARGET = EmotionTarget(valence=2, arousal=0)

#: What the words of the other runs did to valence.
DID = {"bright": 2.0, "dark": -2.0, "red": -1.0, "calm": 0.5}


class Words(Own):
    """Every word in turn."""

    def says(self, neutral: str, seed: int) -> str:
        return f"{neutral} {list(DID)[seed % 4]} {seed % 97}"


def teach(home: Path, **more: Any) -> None:
    with open_store(settings_for(home)) as store:
        for run, word in enumerate([*DID] * 6):
            reading = lambda round_, index, did=DID[word]: (did * round_, 0.0)  # noqa: E731
            # The second round's prompt gets the word.
            events = [
                e.model_copy(update={"prompt": e.prompt.replace("bright 1", word)})
                if isinstance(e, Rewritten | ImageGenerated)
                else e
                for e in run_events(
                    store, run, model="painter", images=1, reading=reading, target=TARGET, **more
                )
            ]
            store.append(*events)


def make(home: Path, model: Scripted | None = None, **options: Any) -> Loop:
    loop = {
        "rounds": 2,
        "images": 4,
        "proposals": 4,
        "patience": 3,
        "tolerance": 0.0,
        "rewriter": f"{__name__}:Words",
    }
    return open_loop(generator=Painter(), lvlm=model or Scripted(), home=str(home), loop={**loop, **options})


def words(result: Any, number: int) -> list[str]:
    return [
        c.prompt.removeprefix("a dog by the sea").split()[0] for c in result.rounds[number].candidates[1:]
    ]


async def test_a_model_of_words_picks_what_is_painted(tmp_path):
    async with make(tmp_path / "none", oversample=4) as loop:
        unaided = await loop.run("a dog by the sea", TARGET, seed=7)
    teach(tmp_path / "taught")
    async with make(tmp_path / "taught", oversample=4, memory=1) as loop:
        result = await loop.run("a dog by the sea", TARGET, seed=7)
        again = await loop.run("a dog by the sea", TARGET, seed=7, oversample=1, memory=0)
        forgetful = await loop.run("a dog by the sea", TARGET, seed=7, memory=0)
    assert set(words(result, 0)) == {"bright"}
    # Where nothing is known, what is written is painted as it comes.
    assert words(unaided, 0) == words(again, 0) and len(set(words(again, 0))) > 1
    assert [c.prompt for r in forgetful.rounds for c in r.candidates] == [
        c.prompt for r in unaided.rounds for c in r.candidates
    ]
    # A run's own readings count as well: here bright words turned out otherwise.
    assert {c.prompt for c in result.rounds[1].candidates}.isdisjoint(
        c.prompt for c in result.rounds[0].candidates
    )


async def test_what_a_run_read_itself_counts_above_the_log(tmp_path):
    teach(tmp_path)
    with open_store(settings_for(tmp_path)) as store:
        knowledge = Knowledge(store, Painter())
        own = run_events(
            store,
            99,
            model="painter",
            rounds=2,
            images=3,
            prompt="a tent",
            reading=lambda r, i: (-2.0 * r, 0.0),
        )
        store.append(*own)
        fold = store.fold("run-0099")
        given = await knowledge.advice(fold, TARGET, 2, {"oversample": 3, "memory": 1}, 2)
        assert given["spare"] == 4
        # The log says that bright is good; three pictures of this run said that it is not.
        asked = ["a tent bright 1 red", "a tent calm", "a tent bright 1"]
        assert given["rank"](asked)[0] == 1
        assert await knowledge.advice(fold, TARGET, 2, {}, 2) == {}


async def test_the_model_is_fitted_anew_only_when_the_log_has_grown(tmp_path, monkeypatch):
    fits: list[int] = []
    whole = WordModel.__init__

    def counted(self: WordModel, texts: Any = (), *args: Any, **more: Any) -> None:
        fits.append(len(texts))
        whole(self, texts, *args, **more)

    monkeypatch.setattr(WordModel, "__init__", counted)
    teach(tmp_path)
    async with make(tmp_path, oversample=2, memory=1, rounds=1, images=2, proposals=2) as loop:
        for seed in range(3):
            await loop.run("a dog", TARGET, seed=seed)
    # 216 events, 225, 234: it is fitted to the first 208 and to the first 224.
    assert len(fits) == 2 and 40 < fits[0] < fits[1]


async def test_what_others_added_is_tried_behind_the_runs_own_prompt(tmp_path):
    teach(tmp_path)
    async with make(tmp_path, memory=3) as loop:
        result = await loop.run("a dog by the sea", TARGET, seed=7)
        events = await loop.recorder.events(result.run_id)
    first = [e for e in events if isinstance(e, Rewritten) and e.round == 0]
    assert [e.prompt_version for e in first].count("memory") == 1  # at most half of three
    [taken] = [e for e in first if e.prompt_version == "memory"]
    assert taken.prompt == "a dog by the sea bright" and "came near the target" in taken.why
    assert taken.prompt in {c.prompt for c in result.rounds[0].candidates}
    assert not any(e.prompt_version == "memory" for e in events if isinstance(e, Rewritten) and e.round)


async def test_a_general_rewriter_is_shown_them():
    class Lister(Scripted):
        def _rewrite(self, messages: Any) -> str:
            number = self.calls["rewriter"]
            return json.dumps({"why": "so", "prompts": [f"a dog {number} {word}" for word in DID]})

    model = Lister()
    examples = [
        Example("a cat", "bright sun over a cat", 1.9, 0.1),
        Example("a hill", "a hill, bright", 2.0, 0.0),
    ]
    found = await propose(
        SimpleRewriter(model, "rewriter"), RewriteRequest("a dog", TARGET, count=4, examples=examples)
    )
    said = str(model.seen[0][-1].content)
    assert (
        "a cat -> bright sun over a cat (valence +1.9 arousal +0.1)" in said and "Write 3 different" in said
    )
    # The first says its own prompt otherwise, so that nothing of it can be put behind another.
    assert [it.prompt for it in found] == ["a dog 1 bright", "a dog 1 dark", "a dog 1 red", "a dog, bright"]
    assert found[0].usage["total_tokens"] == 15 and not found[3].usage
    bare = Lister()
    await propose(SimpleRewriter(bare, "rewriter"), RewriteRequest("a dog", TARGET, count=4))
    assert "other neutral prompts" not in str(bare.seen[0][-1].content)


@pytest.mark.parametrize("option", [{"oversample": 0}, {"memory": -1}, {"finalists": -1}])
async def test_what_makes_no_sense_is_refused(tmp_path, option):
    async with make(tmp_path) as loop:
        with pytest.raises(ValueError, match=next(iter(option))):
            await loop.run("a dog", TARGET, seed=7, **option)
