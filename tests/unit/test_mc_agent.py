"""MC-Agent by parts and alone: personas, checks, choice, and the subgraph over a chat model that answers by rule."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from cast import Cast
from emoloop.agents.ask import Asker
from emoloop.agents.rewriters import RewriteRequest, load_rewriter, propose
from emoloop.agents.rewriters.mc_agent import persona
from emoloop.agents.rewriters.mc_agent.agent import MCAgent, as_felt, checked
from emoloop.agents.rewriters.mc_agent.choose import choose
from emoloop.agents.rewriters.mc_agent.drawable import cut, lost, undrawable
from emoloop.agents.rewriters.mc_agent.panel import Panel
from emoloop.domain import Candidate, Critique, Emotion, EmotionTarget, Round, UserError
from emoloop.miniature import world

TARGET = EmotionTarget(valence=-2, arousal=1)


def test_a_dozen_personas_ship_and_a_seed_draws_them(tmp_path):
    every = persona.load()
    assert len(every) >= 12 and len({(it.feels.valence, it.feels.arousal) for it in every.values()}) > 8
    assert [it.name for it in persona.draw(5, 7)] == [it.name for it in persona.draw(5, 7)]
    assert {it.name for seed in range(40) for it in persona.draw(3, seed)} == set(every)
    (tmp_path / "smith.yaml").write_text("age: 30\nculture: c\ntemperament: t\nmoved_by: fire\n")
    (tmp_path / "monk.yaml").write_text("age: 1\nculture: c\ntemperament: t\nmoved_by: m\n")
    mine = persona.load(tmp_path)
    assert mine["smith"].feels.valence == 0 and mine["monk"].age == 1 and len(mine) == len(every) + 1


def test_wrong_personas_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no \.yaml file"):
        persona.load(tmp_path / "none")
    (tmp_path / "smith.yaml").write_text("age: old\nculture: c\ntemperament: t\nmoved_by: fire\n")
    with pytest.raises(UserError, match=r"smith\.yaml: age"):
        persona.load(tmp_path)
    with pytest.raises(UserError, match="personas 99: there are 12"):
        persona.draw(99, 0)


def test_clauses_that_nobody_can_draw_are_cut_and_named():
    words = ["evoking", "nostalgia", "hope", "mood", "loss"]
    prompt = "a dog by the sea, evoking nostalgia and Hope, under a red lamp. A mood of loss."
    assert undrawable(prompt) == words
    assert cut("a dog by the sea", prompt) == ("a dog by the sea, under a red lamp.", words)
    assert cut("a statue of hope", "a statue of hope, in rain") == ("a statue of hope, in rain", [])
    assert not [word for word in world.words() if undrawable(word)], (
        "a thing of the embedded world can be drawn"
    )
    assert undrawable("a lovely dog with a wistful look in a peaceful garden") == []


def test_what_was_asked_for_stays():
    assert lost("an old man on a bench", "a man sits on benches, OLD and tired") == []
    assert lost("an old man on a bench", "a bench in fog") == ["old", "man"]
    assert checked("a dog", "a wolf in fog")[2] == "it loses dog"
    assert checked("a dog", "a dog full of hope")[1:] == (["hope"], "nobody can draw it: hope")
    assert checked("a dog", "")[2] == "the rewriter wrote an empty prompt"


def test_the_choice_takes_what_differs_and_then_what_is_expected_near():
    prompts = ["a dog red lamp", "a dog red lamps lamp", "a dog blue boat", "a dog green door"]
    assert {place for place, _ in choose(prompts, 3, "a dog", TARGET)} == {0, 2, 3}
    assert all(error is None for _, error in choose(prompts, 3, "a dog", TARGET))

    def shot(index: int, prompt: str, valence: float) -> Candidate:
        critique = Critique(valence=valence, arousal=1, category=Emotion.AWE, alignment=1)
        return Candidate(
            round=0, index=index, prompt=prompt, seed=0, sha256="0" * 64, critique=critique, reward=0
        )

    seen = [
        shot(0, "a dog red lamp", 2.0),
        shot(1, "a dog blue boat", -2.0),
        shot(2, "a dog green door", 2.0),
    ]
    drafts = ["a dog red door", "a dog blue boat night"]
    [(first, error)] = choose(drafts, 1, "a dog", TARGET, [Round(prompt="a dog", candidates=seen)])
    assert first == 1 and error is not None


async def test_personas_draft_and_the_director_hands_over_different_prompts():
    model, panel = Cast(), Panel(personas=4)
    found = await propose(
        MCAgent(model), RewriteRequest("a dog by the sea", TARGET, count=3, seed=5, panel=panel)
    )
    assert [role for role, _ in model.asked] == ["persona"] * 4 + ["director"]
    assert len({age for role, age in model.asked if role == "persona"}) == 4
    assert len({it.prompt for it in found}) == 3 and all("seen from afar" in it.prompt for it in found)
    assert [it.number for it in found] == [0, 1, 2] and found[0].usage["total_tokens"] == 15
    assert found[0].why == "each in its own light" and not found[1].usage
    draft = panel.answers[0].draft
    assert draft.refused == ["sense of", "loss"] and draft.reason is None and "loss" not in draft.prompt
    assert list(draft.said) == ["emotion", "appraisal", "concepts", "light"]
    assert draft.said["concepts"] == "a door, a coat"
    assert panel.answers[0].usage["total_tokens"] == 15


async def test_a_panel_asks_nothing_again_that_it_has():
    panel = Panel(personas=3)
    first, second = Cast(), Cast()
    told = await propose(
        MCAgent(first), RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=panel)
    )
    del panel.answers[1]
    again = await propose(
        MCAgent(second), RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=panel)
    )
    assert [role for role, _ in second.asked] == ["persona", "director"] and second.asked[0] in first.asked
    assert [it.prompt for it in again] == [it.prompt for it in told]


async def test_a_persona_that_fails_leaves_the_rest():
    model = Cast(wrong=lambda role, number: RuntimeError("gone") if number == 2 else None)
    panel = Panel(personas=3)
    found = await propose(
        MCAgent(model), RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=panel)
    )
    reasons = [it.draft.reason for it in panel.answers.values()]
    assert sorted(map(str, reasons)) == ["None", "None", "RuntimeError: gone"]
    assert len(found) == 2 and found[0].refused is None


async def test_without_a_director_the_drafts_are_taken_as_they_are():
    model = Cast(wrong=lambda role, number: "no idea" if role == "director" else None)
    found = await propose(
        MCAgent(model), RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=Panel(personas=3))
    )
    assert len({it.prompt for it in found}) == 2 and "lamp number" in found[0].prompt
    assert "drafts are taken as they are" in found[0].notes[0] and "picked of 3 drafts" in found[1].why


async def test_where_all_fail_the_simple_rewriter_writes_and_the_reason_is_said():
    model = Cast(wrong=lambda role, number: None if role == "simple" else "a dog, I think")
    found = await propose(
        MCAgent(model), RewriteRequest("a dog by the sea", TARGET, count=1, seed=5, panel=Panel(personas=2))
    )
    assert [it.prompt for it in found] == ["a dog by the sea in fog"] and found[0].prompt_id == "proposals@1"
    assert "no persona's draft can be used (no usable answer" in found[0].notes[0]
    assert ("director", "") not in model.asked


async def test_what_the_simple_rewriter_writes_in_their_place_is_checked_too():
    class Copies(Cast):
        prompts: list[str]

        def _simple(self, about: Any, said: str) -> str:
            return json.dumps({"why": "w", "prompts": self.prompts})

    async def ask(*prompts: str):
        model = Copies(prompts=list(prompts), wrong=lambda role, _: "?" if role == "persona" else None)
        request = RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=Panel(personas=2))
        return await propose(MCAgent(model), request)

    [only] = await ask("a new prompt", "another prompt")
    assert only.prompt == "a dog by the sea" and only.refused == "it loses dog, sea"
    assert any("no persona's draft can be used" in it for it in only.notes)
    [only] = await ask("a new prompt", "a dog by the sea in rain, a sense of dread")
    assert only.prompt == "a dog by the sea in rain" and not only.refused
    for said in (
        "no persona's draft can be used",
        "cut: sense of, dread",
        "1 new prompts where 2 were wanted",
    ):
        assert any(said in it for it in only.notes), only.notes


async def test_a_model_with_a_format_of_its_own_is_asked_in_that():
    class Own(Cast):
        def _simple(self, about: Any, said: str) -> str:
            wanted = re.findall(r"target: (.*)", said)[-1]
            prompt = f"a dog by the sea thing{len(self.asked)}"
            return json.dumps({"why": wanted, "changes": "dim", "prompt": prompt})

    model, panel = Own(), Panel(personas=3)
    agent = load_rewriter("mc_agent", Asker(model), "rewriter-compact")
    assert agent.prompt_id == "mc_agent rewriter-compact.1"
    found = await propose(agent, RewriteRequest("a dog by the sea", TARGET, count=2, seed=5, panel=panel))
    assert len(found) == 2 and [role for role, _ in model.asked] == ["simple"] * 4
    told = {it.draft.persona: it.draft.said["target"] for it in panel.answers.values()}
    for name, target in told.items():
        felt = as_felt(TARGET, persona.load()[name])
        assert target == f"valence {felt.valence:+.1f} arousal {felt.arousal:+.1f}"
    assert len(set(told.values())) == 3
    assert "picked of 4 drafts" in found[0].why and found[0].changes == "dim"
    assert found[0].usage == {} and found[0].seconds == 0.0


def test_a_feeling_of_ones_own_stays_within_the_scale():
    who = persona.load()["schoolgirl"]
    assert as_felt(EmotionTarget(valence=-3), who) == EmotionTarget(valence=-3)
    assert as_felt(EmotionTarget(valence=1, arousal=1), who).arousal == 0.5


async def test_concurrent_rounds_do_not_mix():
    agent, panels = MCAgent(Cast()), [Panel(personas=3) for _ in range(4)]
    asked = [
        agent.propose(RewriteRequest("a dog by the sea", TARGET, count=2, seed=n, panel=panel))
        for n, panel in enumerate(panels)
    ]
    await asyncio.gather(*asked)
    drawn = [{it.draft.persona for it in panel.answers.values()} for panel in panels]
    assert drawn == [{it.name for it in persona.draw(3, n)} for n in range(4)]
