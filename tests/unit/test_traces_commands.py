"""`emoloop traces …` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from emoloop.cli import app
from emoloop.domain import Critique, EmotionTarget, Missing, RunStatus, StopReason, UserError
from emoloop.events import Critiqued, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from emoloop.settings import Settings
from emoloop.traces.store import open_store
from PIL import Image
from rl_log import run_events, settings_for, write_log
from typer.testing import CliRunner


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_store(Settings(home=tmp_path / ".emoloop")) as store:
        for colour, (run_id, valence) in enumerate({"dog-1": 2.0, "cat-2": -2.0}.items()):
            prompt = f"a {run_id[:3]} by the sea [bold]"
            target = EmotionTarget(valence=valence, arousal=-1.0)
            events = [RunStarted(run_id=run_id, prompt=prompt, target=target, seed=7)]
            for number in (0, 1):
                if number:
                    events.append(
                        Rewritten(
                            run_id=run_id,
                            round=1,
                            prompt=f"{prompt}, golden light",
                            changes="light",
                            why="too dark",
                            model="m",
                            prompt_version="1",
                        )
                    )
                for index in (0, 1):
                    sha256 = store.blobs.put_image(Image.new("RGB", (8, 8), (colour, number, index)))
                    place = {"run_id": run_id, "round": number, "index": index, "sha256": sha256}
                    made = {
                        "prompt": prompt,
                        "model": "tiny",
                        "steps": 1,
                        "guidance": 1.0,
                        "height": 8,
                        "width": 8,
                    }
                    reading = (
                        Missing(reason="the critic timed out")
                        if index
                        else Critique(
                            analysis="grey", valence=0.5, arousal=0.0, alignment=1.0, suggestion="warmer"
                        )
                    )
                    value = None if index else 0.25 + number / 2
                    events += [
                        ImageGenerated(**place, seed=index, **made),
                        Critiqued(**place, critique=reading, model="m", prompt_version="1"),
                        Rewarded(**place, name="emotion", version="1", value=value, reason="no critique"),
                    ]
            done = {"status": RunStatus.COMPLETED, "stop_reason": StopReason.ROUNDS_USED}
            events.append(RunFinished(run_id=run_id, warnings=["two critiques are missing"], **done))
            store.append(*events)
    return tmp_path / ".emoloop"


def invoke(*words, **keywords):
    return CliRunner().invoke(app, ["traces", *words], env={"COLUMNS": "200"}, **keywords)


def document(*words):
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list(home):
    text = invoke("list").stdout
    assert "dog-1" in text and "rounds_used" in text and "V+2.0 A-1.0" in text and "+0.500" in text
    assert "[bold]" in text
    listed = document("list")
    assert listed["home"] == str(home)
    assert [run["run_id"] for run in listed["runs"]] == ["cat-2", "dog-1"]
    assert listed["runs"][0]["gain"] == 0.5 and listed["runs"][0]["missing"] == 2


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--valence", "-3", "0"], ["cat-2"]),
        (["--prompt", "DOG"], ["dog-1"]),
        (["--min-gain", "0.6"], []),
        (["--limit", "1"], ["cat-2"]),
        (["--since", "1h"], ["cat-2", "dog-1"]),
        (["--since", "2999-01-01"], []),
        (["--status", "running"], []),
        (["--emotion", "awe"], []),
        (["--model", "tiny", "--adapter", "none"], ["cat-2", "dog-1"]),
        (["--adapter", "abc"], []),
    ],
)
def test_list_filters(home, words, found):
    assert [run["run_id"] for run in document("list", *words)["runs"]] == found


def test_the_list_names_adapters_where_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        "adapter"
        not in CliRunner().invoke(app, ["traces", "list", "--home", str(write_log(tmp_path, 1).home)]).stdout
    )
    with open_store(settings_for(tmp_path)) as store:
        store.append(*run_events(store, 1, adapter="abcdef0123456789"))
    listed = CliRunner().invoke(app, ["traces", "list", "--home", str(tmp_path)]).stdout
    assert "abcdef012345 " in listed and "none " in listed


def test_a_status_that_no_log_holds_is_refused(home):
    assert isinstance(invoke("list", "--status", "interrupted").exception, UserError)


def test_show(home):
    text = invoke("show", "dog").stdout
    for words in (
        "a dog by the sea [bold], golden light",
        "too dark",
        "★",
        "warmer",
        "missing: the critic timed out",
    ):
        assert words in text
    assert "two critiques are missing" in text
    shown = document("show", "last")
    assert shown["run_id"] == "cat-2"
    assert shown["rounds"][1]["candidates"][1]["reward"] is None
    assert set(shown) >= {
        "run_id",
        "status",
        "stop_reason",
        "prompt",
        "target",
        "best",
        "rounds",
        "gain",
        "best_gain",
    }
    assert set(shown["best"]) >= {"image", "sha256", "prompt", "seed", "reward", "estimate"}


def test_export(home, tmp_path):
    lines = invoke("export", "jsonl", "dog").stdout.splitlines()
    assert {json.loads(line)["run_id"] for line in lines} == {"dog-1"}
    assert document("export", "jsonl", "--out", "deep/events.jsonl")["count"] == 2 * len(lines)
    assert (tmp_path / "deep" / "events.jsonl").read_text().count("\n") == 2 * len(lines)
    assert document("export", "pickapic", "--prompt", "cat", "--out", "pairs.parquet")["count"] == 1
    for words in (["parquet"], ["pickapic"], ["jsonl", "--json"]):
        assert isinstance(invoke("export", *words).exception, UserError)


def test_rm(home):
    refused = invoke("rm", "dog", input="n\n")
    assert refused.exit_code == 1 and "dog-1" in refused.stderr
    assert len(document("list")["runs"]) == 2
    assert document("rm", "dog", "--yes") == {"removed": ["dog-1"], "events": 15, "files": 4}
    assert [run["run_id"] for run in document("list")["runs"]] == ["cat-2"]
    assert len(list((home / "blobs").rglob("*.png"))) == 4


def test_replay(home, monkeypatch):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(invoke("replay", "dog").exception, UserError)
    exporter = InMemorySpanExporter()
    seen = []
    monkeypatch.setattr("emoloop.traces.spans.open_exporter", lambda it: seen.append(it) or exporter)
    sent = document("replay", "dog", "--endpoint", "http://collector:4318")
    assert sent["runs"] == ["dog-1"] and sent["spans"] == len(exporter.get_finished_spans()) > 0
    assert seen[0].otlp_endpoint == "http://collector:4318"


def test_rebuild(home):
    before = document("list")
    assert invoke("rebuild").exit_code == 0
    assert document("list") == before


@pytest.mark.parametrize(
    "words", [["show", "nothing"], ["list", "--since", "yesterday"], ["rm", "x", "--yes"]]
)
def test_wrong_words_are_one_clear_line(home, words):
    result = invoke(*words)
    assert isinstance(result.exception, UserError) and "\n" not in str(result.exception)


def test_a_home_without_a_log_is_left_alone(tmp_path):
    result = invoke("list", "--home", str(tmp_path / "nowhere"))
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "nowhere").exists()


def test_help_loads_nothing_heavy():
    heavy = "torch transformers diffusers langgraph sqlalchemy opentelemetry pyarrow PIL numpy"
    code = (
        "import sys; from typer.testing import CliRunner; from emoloop.cli import app\n"
        "assert CliRunner().invoke(app, ['traces', '--help']).exit_code == 0\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--where", "valence=-3..0"], ["cat-2"]),
        (["--where", "prompt=DOG", "--where", "status=completed"], ["dog-1"]),
        (["--from", "gain=0.4,limit=1"], ["cat-2"]),
        (["--where", "run=dog"], ["dog-1"]),
        (["--limit=1", "--model", "tiny"], ["cat-2"]),
    ],
)
def test_one_filter_for_all_verbs(home, words, found):
    assert [run["run_id"] for run in document("list", *words)["runs"]] == found
    exported = document("export", "jsonl", *words, "--out", "some.jsonl")["count"]
    assert exported == 15 * len(found)


def test_rm_takes_a_filter_and_never_everything(home):
    for words in (["rm", "--yes"], ["rm", "", "--yes"], ["rm", " ", "--yes"]):
        assert isinstance(invoke(*words).exception, UserError)
    assert document("rm", "--where", "valence=1..3", "--yes")["removed"] == ["dog-1"]
    assert [run["run_id"] for run in document("list")["runs"]] == ["cat-2"]


@pytest.mark.parametrize("words", [["rm", "last", "--yes"], ["rebuild"], ["replay"]])
def test_a_mistyped_home_stays_as_it_is(tmp_path, words):
    result = invoke(*words, "--home", str(tmp_path / "tpyo" / "home"))
    assert isinstance(result.exception, UserError) and "no traces in" in str(result.exception)
    assert not (tmp_path / "tpyo").exists()


def test_an_export_says_what_it_counts(home):
    assert "30 events in" in invoke("export", "jsonl", "--out", "e.jsonl").stderr
    assert "1 pair in" in invoke("export", "pickapic", "dog", "--out", "p.parquet").stderr
    assert "2 trajectories in" in invoke("export", "reflection", "--out", "r").stderr
