"""MC-Agent in the loop: events, results, pages, terminal; resuming; the verb. Models follow rules."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from typing import Any

import emoloop
from cast import Cast, Looking
from emoloop.cli import app
from emoloop.cli.traces_view import show_run
from emoloop.domain import EmotionTarget, RunStatus
from emoloop.events import PersonaAnswered, Rewritten
from emoloop.graph.loop import Loop, open_loop
from emoloop.graph.rewriting import rewrite
from emoloop.rl.data.chats import rewriter_turns
from emoloop.service.reading import document
from emoloop.settings import load_settings
from emoloop.traces.genai import call
from fake_openai import chat, serving
from painter import Painter
from rich.console import Console
from scripted import critic_answer
from typer.testing import CliRunner

TARGET = EmotionTarget(valence=2, arousal=-1)


def make(tmp_path, model: Cast, **options: Any) -> Loop:
    chosen = {"rounds": 2, "images": 3, "proposals": 2, "patience": 3, "rewriter": "mc_agent", "personas": 3}
    return open_loop(generator=Painter(), lvlm=model, home=str(tmp_path / "home"), loop={**chosen, **options})


async def test_each_persona_is_an_event_and_every_view_shows_it(tmp_path):
    model = Looking()
    async with make(tmp_path, model) as loop:
        told = [event async for event in loop.stream("a dog", TARGET, seed=7, run_id="one")]
        result, events = await loop.recorder.result("one"), await loop.recorder.events("one")
        calls = (await loop.recorder.fold("one")).calls
        state = await loop.graph.aget_state({"configurable": {"thread_id": "one"}})
        drawn = loop.graph.get_graph(xray=True)
    assert [type(it) for it in told] == [type(it) for it in events]
    drafts = [it for it in events if isinstance(it, PersonaAnswered)]
    assert [(it.round, it.index) for it in drafts] == [(n, index) for n in (0, 1) for index in range(3)]
    assert len({it.draft.persona for it in drafts[:3]}) == 3 and drafts[0].draft.refused == [
        "sense of",
        "loss",
    ]
    assert [[it.persona for it in round.drafts] for round in result.rounds] == [
        [it.draft.persona for it in drafts[:3]],
        [it.draft.persona for it in drafts[3:]],
    ]
    written = [it for it in events if isinstance(it, Rewritten)]
    assert [it.prompt_version for it in written] == ["mc_agent persona.1 director.1"] * 3
    assert written[0].why == "each in its own light" and "seen from afar" in written[0].prompt
    # 6 personas, 2 directors, 6 pictures
    assert calls == 6 + 2 + 6
    assert len(json.dumps(state.values)) < 20_000
    assert {"rewrite:persona", "rewrite:director"} <= set(drawn.nodes)
    out = io.StringIO()
    show_run(Console(file=out, width=200), result)
    name = drafts[0].draft.persona
    assert f"{name}  emotion: unease at dusk → appraisal: somebody left" in out.getvalue()
    assert "cannot be drawn: sense of, loss" in out.getvalue()
    page = document(events)
    assert [it.persona for it in page.rounds[1].drafts] == [it.draft.persona for it in drafts[3:]]
    assert page.tokens == {"input": 140, "output": 70} and page.seconds["rewrites"] >= 0
    assert call(drafts[0])[0] == "chat cast"
    assert not list(rewriter_turns(result, events)), "a director's answer is no simple rewriter's"


async def test_a_run_that_was_stopped_at_a_persona_asks_no_other_again(tmp_path):
    reached = asyncio.Event()

    class Stuck(Looking):
        begun: int = 0

        async def _agenerate(self, messages: list[Any], *args: Any, **more: Any) -> Any:
            self.begun += messages[0].content.startswith("You are this person")
            if self.begun == 6:  # the last persona of the second round
                reached.set()
                await asyncio.Event().wait()
            return await super()._agenerate(messages)

    async with make(tmp_path, Stuck()) as loop:
        run = asyncio.create_task(loop.run("a dog", TARGET, seed=7, run_id="one"))
        await reached.wait()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    second = Looking()
    async with make(tmp_path, second) as loop:
        before = await loop.recorder.events("one")
        result = await loop.resume("one")
    kept = [it for it in before if isinstance(it, PersonaAnswered)]
    assert result.status is RunStatus.COMPLETED and 3 <= len(kept) < 6
    assert [role for role, _ in second.asked] == ["persona"] * (6 - len(kept)) + ["director"]
    undisturbed = Looking()
    async with make(tmp_path / "other", undisturbed) as loop:
        expected = await loop.run("a dog", TARGET, seed=7, run_id="one")
    assert [it.drafts for it in result.rounds] == [it.drafts for it in expected.rounds]
    assert [it.proposals for it in result.rounds] == [it.proposals for it in expected.rounds]


async def test_concurrent_runs_do_not_mix(tmp_path):
    async with make(tmp_path, Looking()) as loop:
        asked = (loop.run(f"a {it}", TARGET, seed=7, run_id=it) for it in ("dog", "cat", "boat"))
        results = await asyncio.gather(*asked)
    for result in results:
        assert all(result.prompt in it.prompt for round in result.rounds for it in round.drafts)


async def test_a_passing_trouble_is_tried_again_by_the_graph_and_a_lasting_one_leaves_the_rest(tmp_path):
    trouble = {2: ConnectionError("down")}
    model = Looking(wrong=lambda role, number: trouble.pop(number, None))
    async with make(tmp_path, model, rounds=1) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert [it.reason for it in result.rounds[0].drafts] == [None] * 3
    assert [role for role, _ in model.asked].count("persona") == 4
    model = Looking(wrong=lambda role, number: "nothing" if role == "persona" else None)
    async with make(tmp_path / "all", model, rounds=1) as loop:
        result = await loop.run("a dog", TARGET, seed=7)
    assert any("no persona's draft can be used" in it for it in result.warnings)
    assert result.rounds[0].proposals[1].prompt == "a dog by the sea in fog"


def test_a_rewriter_alone_from_python():
    found = emoloop.rewrite("a dog", TARGET, rewriter="mc_agent", count=2, seed=3, lvlm=Looking())
    assert len(found.proposals) == 2 and len(found.drafts) == 5 and found.rewriter == "mc_agent"


async def test_over_http_personas_are_asked_at_the_same_time_and_each_as_itself():
    recorded, bodies, together = Cast(), list[dict[str, Any]](), threading.Barrier(4)

    def plain(said: Any) -> str:
        return said if isinstance(said, str) else "".join(part.get("text", "") for part in said)

    def script(number: int, body: dict[str, Any]) -> Any:
        said = [plain(it["content"]) for it in body["messages"]]
        if not said[0].startswith("You"):  # the client tries a server out
            return chat(critic_answer())
        bodies.append(body)
        if "You are this person" in said[0]:
            together.wait(timeout=60)
        return chat(recorded.reply(*said[:2]))

    with serving() as server:
        server.script = script
        lvlm = {"engine": "vllm", "model": "tiny", "base_url": server.url}
        settings = load_settings({"lvlm": lvlm, "loop": {"rewriter": "mc_agent", "personas": 4}})
        found = await rewrite("a dog by the sea", TARGET, settings, count=2, seed=1)
    assert len(found.proposals) == 2 and found.warnings == []
    asked = [it["response_format"]["json_schema"]["name"] for it in bodies]
    assert asked == ["persona"] * 4 + ["director"]
    assert len({plain(it["messages"][0]["content"]) for it in bodies[:4]}) == 4
    assert len({it["seed"] for it in bodies}) == 5
    assert plain(bodies[-1]["messages"][1]["content"]).count("Because: somebody left") == 4


def test_the_verb_on_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["rewrite", "a dog by the sea", "--valence", "-2", "--arousal", "1", "--rewriter", "mc_agent"]
    done = CliRunner().invoke(app, [*asked, "--count", "2", "--json", "--set", "loop.personas=3"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert len({it["prompt"] for it in said["proposals"]}) == 2
    assert all(it["prompt"].startswith("a dog by the sea") for it in said["proposals"])
    assert len(said["drafts"]) >= 4 and len({it["persona"] for it in said["drafts"]}) == 3
    plain = CliRunner().invoke(app, [*asked[:-2], "--valence", "-2"])
    assert plain.exit_code == 0 and plain.stdout.startswith("a dog by the sea")
    assert CliRunner().invoke(app, ["rewrite", "a dog", "--valence", "9"]).exit_code != 0
