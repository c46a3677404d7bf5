"""`emoloop run` and `emoloop collect` as a shell sees them: streams, files, exit codes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from emoloop import cli
from emoloop.graph import parts as parts_module
from emoloop.settings import load_settings
from emoloop.traces.store import open_store
from painter import Painter
from PIL import Image
from scripted import Scripted

ASKED = [
    "a dog by the sea",
    "--valence",
    "2.0",
    "--arousal",
    "-1.0",
    "--rounds",
    "2",
    "--images",
    "2",
    "--seed",
    "7",
]


class Shell:
    """Runs the command line in this process, in an empty folder."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.folder, self.model, self.painter = folder, Scripted(), Painter()
        self._patch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("EMOLOOP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setattr(parts_module, "load_lvlm", lambda settings, images: self.model)
        monkeypatch.setitem(sys.modules, "drawing", self)

    def make(self, settings) -> Painter:
        return self.painter

    def __call__(self, *words: str, own_model: bool = True) -> tuple[int, str, str]:
        model = ["--model", "drawing:make"] if own_model and words[0] in ("run", "collect", "worker") else []
        self._patch.setattr(sys, "argv", ["emoloop", *words, *model])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(end.value.code or 0), out, err


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Shell:
    return Shell(tmp_path, monkeypatch, capsys)


def test_one_round_of_one_image_is_named_so(shell):
    code, _, err = shell("run", "a dog", "--valence", "1", "--rounds", "1", "--images", "1")
    assert code == 0 and "up to 1 round of 1 image\n" in err and "after 1 round, " in err


def test_a_training_refused_shows_no_figures(shell):
    words = ["distill", "nosuch", "--preset", "miniature", "--out", "artifact"]
    code, _, err = shell(*words)
    assert code == 2 and "unknown objective 'nosuch'" in err and "loss" not in err


def test_a_run_leaves_what_a_person_opens(shell):
    code, out, err = shell("run", *ASKED)
    assert (code, out) == (0, "")
    assert "round 0  a dog by the sea" in err and "seed 7" in err
    [folder] = (shell.folder / "emoloop-runs").iterdir()
    assert {file.name for file in folder.iterdir()} == {"best.png", "sheet.png", "trace.jsonl"}
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 600 and sheet.height > 600
    events = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    assert events[0]["type"] == "run_started" and events[-1]["type"] == "run_finished"


def test_json_is_one_document_and_nothing_else(shell):
    code, out, _ = shell("run", *ASKED, "--json", "--out", "result", "--home", "somewhere")
    assert code == 0
    document = json.loads(out)
    wanted = [
        "run_id",
        "status",
        "stop_reason",
        "prompt",
        "target",
        "best",
        "rounds",
        "gain",
        "best_gain",
        "home",
    ]
    assert set(wanted) <= set(document)
    assert {"image", "sha256", "prompt", "seed", "reward", "estimate"} <= set(document["best"])
    assert {"image", "sha256", "seed", "reward", "critique"} <= set(document["rounds"][0]["candidates"][0])
    assert Path(document["best"]["image"]).is_file()
    assert document["home"] == str(shell.folder / "somewhere")
    assert (shell.folder / document["files"]["sheet"]).is_file()


def test_environment_and_file_give_settings(shell, monkeypatch):
    (shell.folder / "emoloop.toml").write_text("[loop]\nrounds = 1\nimages = 1\n")
    monkeypatch.setenv("EMOLOOP_LOOP__IMAGES", "3")
    code, out, _ = shell("run", "a dog", "--emotion", "awe", "--json", "--set", "loop.tolerance=0.5")
    assert code == 0
    document = json.loads(out)
    assert len(document["rounds"]) == 1 and len(document["rounds"][0]["candidates"]) == 3
    assert document["target"]["category"] == "awe"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a dog", "--valence", "7"], "valence 7.0: a number from -3 to +3 is wanted"),
        (["a dog", "--emotion", "joy"], "unknown emotion 'joy': known are amusement"),
        (["a dog"], "a target needs a valence, an arousal or a category"),
        (["", "--valence", "1"], "the prompt is empty"),
        (["x" * 100_000, "--valence", "1"], "the prompt has 100000 characters"),
        (["a dog", "--valence", "1", "--rounds", "0"], "setting loop.rounds"),
        (["a dog", "--valence", "1", "--set", "loop.ruonds=1"], "unknown setting 'loop.ruonds'"),
        (["a dog", "--valence", "1", "--set", "rounds"], "KEY=VALUE"),
        (["a dog", "--valence", "1", "--reward", "kindness"], "unknown reward 'kindness'"),
        (["a dog", "--valence", "1", "--home", "file/home"], "cannot write to home"),
        (["a dog", "--valence", "1", "--out", "file/out"], "cannot write to --out file/out"),
        (["a dog", "--valence", "1", "--seed", "-4"], "seed -4"),
        (
            ["an astronaut", "--valence", "1", "--strict"],
            "does not know 'an' (nearest: dog, cat); 'astronaut'",
        ),
        (["--resume", "nothing"], "no traces in"),
        (["a dog", "--resume", "last"], "leave out PROMPT"),
        (["--resume", "last", "--category", "awe"], "leave out --category"),
        (["--resume", "last", "--rounds", "5"], "leave out --rounds"),
        (["--resume", "last", "--review"], "leave out --review"),
        (["--resume", "last", "--set", "loop.patience=5"], "leave out --patience"),
        ([], "say what the picture should show"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(shell, words, said):
    (shell.folder / "file").write_text("")
    code, out, err = shell("run", *words)
    assert (code, out) == (2, "")
    complaint = [line for line in err.splitlines() if not line.startswith(("loading", "models loaded"))]
    assert len(complaint) == 1 and said in complaint[0], err
    assert not (shell.folder / "emoloop-runs").exists()
    assert not list(shell.folder.glob("**/*.png"))
    if "--strict" not in words:
        assert not (shell.folder / ".emoloop").exists()


def test_a_misspelt_variable_is_refused(shell, monkeypatch):
    monkeypatch.setenv("EMOLOOP_LOOP__RUONDS", "1")
    code, _, err = shell("run", *ASKED)
    assert code == 2 and "EMOLOOP_LOOP__RUONDS" in err and len(err.splitlines()) == 1


def test_unknown_words_are_one_warning(shell):
    code, _, err = shell("run", "an astronaut", "--valence", "1", "--rounds", "1", "--images", "1")
    assert code == 0
    assert err.count("astronaut' (nearest: dog, cat)") == 1


def test_no_critique_at_all_is_exit_1_and_one_clear_line(shell):
    shell.model = Scripted(fail=lambda role, number: "what a lovely picture")
    code, out, err = shell("run", *ASKED, "--json")
    assert code == 1
    document = json.loads(out)
    assert (document["status"], document["stop_reason"]) == ("failed", "no_critique")
    assert len(document["rounds"][0]["candidates"]) == 2
    assert "failed: round 0: no critique at all: no usable answer after a second try" in err
    shell.model = Scripted()
    code, out, _ = shell("run", "--resume", document["run_id"], "--json")
    again = json.loads(out)
    assert (code, again["run_id"], again["status"]) == (0, document["run_id"], "completed")


def test_some_critiques_missing_is_exit_0_with_a_warning(shell):
    shell.model = Scripted(fail=lambda role, number: ValueError("odd") if number == 1 else None)
    code, _, err = shell("run", *ASKED)
    assert code == 0
    assert "warning: round 0: 1 of 2 critiques missing: ValueError: odd" in err


def test_ctrl_c_saves_and_says_how_to_go_on(shell):
    calm = json.loads(shell("run", *ASKED, "--json")[1])

    class Interrupted(Painter):
        async def generate(self, requests):
            if len(self.requests) + len(requests) > 3:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()  # a picture under way ends only by being cancelled
            return await super().generate(requests)

    shell.painter = Interrupted()
    code, _, err = shell("run", *ASKED, "--home", "other")
    assert code == 130
    [hint] = [line for line in err.splitlines() if "go on with" in line]
    words = hint.partition("emoloop ")[2].split()
    assert words[:2] == ["run", "--resume"] and words[3:] == ["--home", "other"]
    shell.painter = Painter()
    code, out, _ = shell(*words, "--json")
    assert code == 0
    result = json.loads(out)
    assert len(shell.painter.requests) <= 2  # the one that was under way may be made again
    for key in ("prompt", "stop_reason", "gain", "best_gain"):
        assert result[key] == calm[key]
    assert result["best"]["sha256"] == calm["best"]["sha256"]


def test_an_error_beyond_retries_is_one_line_and_resumable(shell, monkeypatch):
    from emoloop.traces.recorder import StoreRecorder

    def broken(self, image):
        raise PermissionError("read-only disk")

    with monkeypatch.context() as patch:
        patch.setattr(StoreRecorder, "get_png", broken)
        code, _, err = shell("run", *ASKED)
    assert code == 1
    assert "broke off: PermissionError: read-only disk" in err
    assert "emoloop run --resume" in err
    assert shell("run", "--resume", "last")[0] == 0


def test_a_resumed_run_keeps_the_model_that_it_began_with(shell):
    (shell.folder / "emoloop.toml").write_text("[lvlm]\nconcurrency = 3\n")
    words = ["--steps", "5", "--model", "drawing:make", "--reward", "emoloop.tools.reward:EmotionReward"]
    shell("run", *ASKED, *words, "--out", "one", own_model=False)
    from emoloop.cli.run import settings_of

    settings, _ = settings_of("last", {})
    assert (settings.generator.model, settings.generator.steps) == ("drawing:make", 5)
    assert settings.loop.reward == "emoloop.tools.reward:EmotionReward"


def test_a_password_in_an_address_is_not_logged_and_a_run_goes_on_with_todays(shell, monkeypatch):
    url = "http://ann:s3cret@127.0.0.1:9/v1"
    monkeypatch.setenv("EMOLOOP_LVLM__BASE_URL", url)
    assert shell("run", *ASKED, "--lvlm", "vllm", "--out", "one")[0] == 0
    for file in [*shell.folder.rglob("*.jsonl"), *shell.folder.rglob("*.db*")]:
        assert b"s3cret" not in file.read_bytes(), file
    from emoloop.cli.run import settings_of

    settings, _ = settings_of("last", {})
    assert (settings.lvlm.engine, settings.lvlm.base_url) == ("vllm", url)
    assert shell("run", "--resume", "last")[0] == 0
    monkeypatch.delenv("EMOLOOP_LVLM__BASE_URL")
    code, _, err = shell("run", "--resume", "last")
    assert code == 2 and "give it again with --set lvlm.base_url=URL" in err


def test_debugging_shows_where_it_broke(shell, monkeypatch):
    from emoloop.traces.recorder import StoreRecorder

    def broken(self, image):
        raise PermissionError("read-only disk")

    monkeypatch.setenv("EMOLOOP_DEBUG", "1")
    monkeypatch.setattr(StoreRecorder, "get_png", broken)
    monkeypatch.setattr(sys, "argv", ["emoloop", "run", *ASKED, "--model", "drawing:make"])
    with pytest.raises(PermissionError):
        cli.main()


def test_collect(shell):
    (shell.folder / "prompts.jsonl").write_text(
        '{"prompt": "a dog", "valence": 2}\n{"prompt": "a cat", "emotion": "awe"}\n{"prompt": ""}\n'
    )
    words = ["collect", "prompts.jsonl", "--rounds", "1", "--images", "1", "--json"]
    code, out, err = shell(*words)
    assert code == 0
    summary = json.loads(out)
    assert {k: summary[k] for k in ("lines", "completed", "already", "failed", "images")} == {
        "lines": 3,
        "completed": 2,
        "already": 0,
        "failed": 1,
        "images": 2,
    }
    assert "line 3: the prompt is empty" in err
    letter = json.loads((shell.folder / "prompts.failed.jsonl").read_text())
    assert letter["line"] == 3
    again = json.loads(shell(*words)[1])
    assert (again["completed"], again["already"], again["images"]) == (0, 2, 0)


def test_a_worker_does_what_is_queued_and_drains_at_a_signal(shell):
    asked = {"prompt": "a dog", "target": {"valence": 2.0}, "seed": 1, "options": {"rounds": 1, "images": 1}}
    with open_store(load_settings()) as store:
        store.queue.add("run", {"one": asked, "two": {**asked, "prompt": ""}})
        store.queue.add("run", {"other": asked}, needs="other models")
    code, out, err = shell("worker", "--until-empty", "--json")
    assert (code, json.loads(out)) == (0, {"completed": 1, "failed": 1})
    assert "run two: the prompt is empty" in err and "queued for other models or loop settings: 1" in err
    # While the first picture is painted: that run ends, and no other is taken.
    with open_store(load_settings()) as store:
        store.queue.add("run", {f"more-{n}": {**asked, "seed": n} for n in range(3)})
    shell.painter.fail = lambda number: os.kill(os.getpid(), signal.SIGTERM)
    code, out, err = shell("worker", "--concurrency", "1", "--json")
    assert (code, json.loads(out)) == (0, {"completed": 1, "failed": 0})
    assert "finishing what is under way" in err
    with open_store(load_settings()) as store:
        assert store.queue.waiting() == {None: 2, "other models": 1}


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read nothing.jsonl"), ("\n", "has no lines")])
def test_collect_needs_lines(shell, content, said):
    if content is not None:
        (shell.folder / "nothing.jsonl").write_text(content)
    code, _, err = shell("collect", "nothing.jsonl")
    assert code == 2 and said in err


def test_the_command_line_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'langgraph', 'langchain_core', 'sqlalchemy', 'PIL'}"
    code = f"import sys, emoloop.cli; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


def test_resume_is_a_verb(shell):
    shell.model = Scripted(fail=lambda role, number: ValueError("on holiday"))
    code, out, _ = shell("run", *ASKED, "--json")
    first = json.loads(out)
    assert (code, first["status"]) == (1, "failed")
    shell.model = Scripted()
    code, out, _ = shell("resume", "last", "--json", "--out", "again")
    again = json.loads(out)
    assert (code, again["run_id"], again["status"]) == (0, first["run_id"], "completed")
    assert (shell.folder / "again" / "best.png").is_file()
    code, _, err = shell("resume", "last", "--set", "loop.rounds=5")
    assert code == 2 and "leave out --rounds" in err
    code, _, err = shell("resume", "")
    assert code == 2 and "empty" in err


def test_a_run_of_another_program_is_refused_in_one_line(shell):
    from emoloop.domain import EmotionTarget
    from emoloop.events import RunStarted
    from emoloop.settings import load_settings
    from emoloop.traces.store import open_store

    target = EmotionTarget(valence=1.0)
    with open_store(load_settings()) as store:
        for run_id, settings in (("bare", {}), ("arm", {"evaluation": {"suite": "loop"}})):
            started = RunStarted(run_id=run_id, prompt="a dog", target=target, seed=1, settings=settings)
            store.append(started)
    for run_id in ("bare", "arm"):
        code, _, err = shell("run", "--resume", run_id)
        assert code == 2 and "not begun by `emoloop run`" in err and len(err.splitlines()) == 1


def test_a_folder_that_refuses_the_files_is_one_line_and_the_run_is_kept(shell):
    (shell.folder / "o" / "best.png").mkdir(parents=True)
    code, out, err = shell("run", *ASKED, "--out", "o")
    assert (code, out) == (1, "")
    assert "is in the log, but o cannot be written" in err and "emoloop run --resume" in err
    assert shell("traces", "show", "last")[0] == 0


def test_a_disk_that_is_full_ends_a_collection_in_one_line(shell, monkeypatch):
    from emoloop.graph import collect as module

    def full(*_):
        raise OSError(28, "No space left on device")

    (shell.folder / "prompts.jsonl").write_text('{"prompt": ""}\n{"prompt": "a dog", "valence": 2}\n')
    monkeypatch.setattr(module, "_bury", full)
    code, out, err = shell("collect", "prompts.jsonl", "--rounds", "1", "--images", "1")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "emoloop: [Errno 28] No space left on device"


def _process(*words, **how):
    program = [sys.executable, "-m", "emoloop", *words]
    return subprocess.run(program, capture_output=True, check=False, timeout=120, **how)


def test_the_module_runs_and_says_its_version():
    from emoloop import __version__

    done = _process("--version")
    assert (done.returncode, done.stdout.decode().strip()) == (0, f"emoloop {__version__}")


def test_another_encoding_of_stdout_and_a_closed_stdin_are_no_reason_to_stop(tmp_path):
    from emoloop.domain import EmotionTarget
    from emoloop.events import RunStarted
    from emoloop.settings import Settings
    from emoloop.traces.store import open_store

    with open_store(Settings(home=tmp_path / "home")) as store:
        prompt = "ein Bär 🐻 am Meer"
        store.append(RunStarted(run_id="r", prompt=prompt, target=EmotionTarget(valence=1.0), seed=1))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "EMOLOOP_HOME": str(tmp_path / "home")}
    done = _process("traces", "show", "r", env=environment)
    assert done.returncode == 0 and not done.stderr
    done = _process("traces", "show", "r", "--json", env=environment)
    assert json.loads(done.stdout)["prompt"] == prompt
    shut = subprocess.run(
        ["bash", "-c", 'exec "$0" -m emoloop traces list <&-', sys.executable],
        capture_output=True, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert shut.returncode == 0, shut.stderr
