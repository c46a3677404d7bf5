"""The public names and their signatures: what programs out there are written against. Change them on purpose only."""

import inspect
import subprocess
import sys
import typing

import emoloop
import pytest
from emoloop.events import EVENT
from emoloop.settings import Settings
from emoloop.traces.store import open_store

SIGNATURES = {
    "apply": "pipe, adapter, target, *, scale, visual_scale, visual_guidance, visual_negative, negative",
    "open_loop": "settings, *, generator, lvlm, reward, checkpointer, **overrides",
    "open_log": "home, *, settings, write",
    "distill": "objective, out, *, home, where, preset, config, knobs, resume, watch, settings",
    "evaluate": "suite, out, *, arms, judge, guard, adapter, critic, limit, allow_reward_judge, home, generator, lvlm, "
    "processes, progress",
    "load_settings": "overrides, base",
    "Loop.resume_sync": "self, run_id, answer, **options",
    "Loop.run_sync": "self, prompt, target, **options",
    "TraceStore.append": "self, *batch",
    "TraceStore.events": "self, run_id, after",
    "TraceStore.runs": "self, where",
    "TraceStore.candidates": "self, run_id, *, where",
    "TraceStore.resolve": "self, name",
    "TraceStore.remove": "self, *run_ids",
    "EmotionTarget": "*, valence, arousal, category",
}


def found(name):
    thing = emoloop
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def written(function):
    words, starred = [], False
    for it in inspect.signature(function).parameters.values():
        if it.kind is it.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        mark = {it.VAR_POSITIONAL: "*", it.VAR_KEYWORD: "**"}.get(it.kind, "")
        starred = starred or it.kind is it.VAR_POSITIONAL
        words.append(f"{mark}{it.name}")
    return ", ".join(words)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    assert written(found(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", ["Loop.run", "Loop.stream", "Loop.resume"])
def test_keywords_of_runs_stay(name):
    given = set(inspect.signature(found(name)).parameters)
    assert {"self"} < given
    if name != "Loop.resume":
        assert {"prompt", "target", "seed", "run_id", "options"} <= given
    assert set(emoloop.RunOptions.__annotations__) == set(emoloop.graph.state.Context.__annotations__)


def test_no_public_signature_takes_anything():
    for name in emoloop.__all__:
        thing = getattr(emoloop, name)
        members = [thing] if inspect.isfunction(thing) else []
        if inspect.isclass(thing) and thing.__module__.startswith("emoloop."):
            members = [
                it for key, it in vars(thing).items() if inspect.isfunction(it) and not key.startswith("_")
            ]
        for member in members:
            for it in inspect.signature(member).parameters.values():
                if it.name != "self":
                    assert it.annotation is not it.empty, f"{name}: {member.__qualname__}: {it.name}"
                if it.kind is it.VAR_KEYWORD:
                    assert "Unpack" in str(it.annotation), f"{name}: {member.__qualname__}: **{it.name}"


def test_every_name_is_there_and_every_event_is_public():
    assert sorted(emoloop.__all__) == list(emoloop.__all__)
    assert all(getattr(emoloop, name) is not None for name in emoloop.__all__)
    assert set(emoloop.__all__) <= set(dir(emoloop))
    union = typing.get_args(typing.get_args(emoloop.Event)[0])
    assert {kind.__name__ for kind in union} <= set(emoloop.__all__)
    assert EVENT is not None
    with pytest.raises(AttributeError):
        _ = emoloop.nothing_of_this_name


def test_importing_costs_nothing_and_types_are_declared():
    code = "import sys, emoloop; print(sorted({'torch', 'pydantic', 'langgraph', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_log_opens_for_reading_only(tmp_path):
    with pytest.raises(emoloop.UserError, match="no traces in"):
        emoloop.open_log(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    event = emoloop.RunStarted(run_id="r", prompt="a dog", target=emoloop.EmotionTarget(valence=1), seed=1)
    with emoloop.open_log(tmp_path / "home", write=True) as log:
        log.append(event)
    with emoloop.open_log(settings=Settings(home=tmp_path / "home")) as log:
        assert [run.run_id for run in log.runs()] == ["r"]
        with pytest.raises(emoloop.Failure):
            log.append(event.model_copy(update={"run_id": "s"}))
    open_store(Settings(home=tmp_path / "home"), read_only=True).close()


def test_wrong_input_is_a_value_error():
    assert issubclass(emoloop.UserError, ValueError) and issubclass(emoloop.Failure, RuntimeError)
