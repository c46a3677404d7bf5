"""Child processes, the server's flags and the installer, without vLLM itself."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_lvlm
from emoloop.cli import app
from emoloop.domain import UserError
from emoloop.settings import LVLMSettings
from emoloop.tools import children
from emoloop.tools.children import GuardedProcess
from emoloop.tools.lvlm.load import load_lvlm
from emoloop.tools.lvlm.vllm import VLLMOffline
from emoloop.tools.vllm import install as vllm_install
from emoloop.tools.vllm import server as vllm_server
from emoloop.tools.vllm.server import VLLMServer, command
from fake_vllm import fake_python
from typer.testing import CliRunner

#: The module; the package's `lvlm` is its commands.
cli_lvlm = sys.modules["emoloop.cli.lvlm"]

#: A leader with a worker that takes no notice of SIGTERM, as a stuck engine might not.
STUBBORN = """
import signal, subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", worker])
print(child.pid, flush=True)
time.sleep(600)
"""

#: A program of ours that is about to be killed without warning.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from emoloop.tools.children import GuardedProcess
child = GuardedProcess([sys.executable, "-S", "-c", sys.argv[1]], python=Path(sys.executable), env=None)
time.sleep(600)
"""


def gone(pid: int, within: float = 30.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def guarded(code: str) -> tuple[GuardedProcess, int]:
    child = GuardedProcess(
        [sys.executable, "-S", "-c", code],
        python=Path(sys.executable),
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.process.stdout is not None
    return child, int(child.process.stdout.readline())


def test_stop_ends_the_whole_tree():
    child, worker = guarded(STUBBORN)
    child.stop()
    assert gone(worker, 0.5)
    child.stop()


def test_workers_end_with_their_leader():
    child, worker = guarded(STUBBORN.replace("time.sleep(600)\n", "sys.exit(3)\n"))
    assert child.process.wait(30) == 3
    assert gone(worker, 0.5)
    child.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_killing_us_leaves_no_orphan():
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    tree = [process.pid for process in psutil.Process(holder.pid).children(recursive=True)]
    assert worker in tree
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert all(gone(pid) for pid in tree)


def test_a_command_that_ignores_everything_is_killed():
    read, write = os.pipe()
    # A shell, which an interrupt ends by its own code at any time before it is ignored; Python's start does not.
    stubborn = ["sh", "-c", "trap '' INT; exec sleep 600"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        os.close(write)
        assert children.main(read, 0.3, stubborn) in (130, 137)
    finally:
        os.close(read)
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)


# ---- flags


def flags(model: str, **options):
    options = {"gpu": True, "host": "127.0.0.1", "port": 1, "names": [model], **options}
    line = command(model, python=Path("python"), **options)
    found, key = {}, ""
    for word in line[5:]:
        if word.startswith("--"):
            key = word[2:]
            found[key] = ""
        elif key:
            found[key] = f"{found[key]} {word}".strip()
    return found


def test_cpu_flags(tmp_path):
    folder = str(tiny_lvlm.build(tmp_path / "m"))
    got = flags(folder, gpu=False, names=["tiny", folder], extra=["--seed", "3"])
    assert got["dtype"] == "float32"
    assert got["block-size"] == "32"
    assert got["max-model-len"] == "2048"
    assert got["served-model-name"] == f"tiny {folder}"
    assert got["limit-mm-per-prompt"] == '{"image": 1}'
    assert '"guidance"' in got["structured-outputs-config"]
    assert {"enforce-eager", "enable-prefix-caching", "enable-prompt-tokens-details"} <= set(got)
    assert got["seed"] == "3"


@pytest.mark.parametrize(
    ("model", "pixels", "more"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "1003520", set()),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "1003520", set()),
        ("Qwen/Qwen3-VL-8B-Instruct", "1310720", set()),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "1310720", {"enable-expert-parallel"}),
    ],
)
def test_gpu_presets(model, pixels, more):
    got = flags(model, tensor_parallel=2, data_parallel=4)
    assert pixels in got["mm-processor-kwargs"]
    assert got["limit-mm-per-prompt"] == '{"image": 1, "video": 0}'
    assert got["dtype"] == "auto"
    assert (got["tensor-parallel-size"], got["data-parallel-size"]) == ("2", "4")
    assert got["mm-encoder-tp-mode"] == "data"
    assert got["max-model-len"] == "8192"
    assert more <= set(got)
    assert "block-size" not in got


# ---- failures to start


def test_a_server_that_dies_says_why(tmp_path):
    folder = tiny_lvlm.build(tmp_path / "m")
    body = (
        'echo "(EngineCore pid=7) ERROR 11-21 16:32:06 [core.py:54] ValueError: No room for the cache"\n'
        'echo "RuntimeError: Engine core initialization failed. See root cause above."\nexit 4'
    )
    server = VLLMServer(
        str(folder), python=fake_python(tmp_path, body), device="cpu", log=tmp_path / "log" / "vllm.log"
    )
    with pytest.raises(UserError, match=r"exit code 4: ValueError: No room for the cache"):
        server.start()
    assert not server.running()


def test_a_server_that_never_gets_ready(tmp_path):
    folder = tiny_lvlm.build(tmp_path / "m")
    seen = []
    server = VLLMServer(str(folder), python=fake_python(tmp_path, "exec sleep 600"), device="cpu")
    with pytest.raises(UserError, match="not ready after 1 s"):
        server.start(1, seen.append)
    assert seen[0].startswith("vLLM: 0 s: ")
    assert not server.running()
    server.log.unlink()


# ---- a server that ends while it is needed


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The interpreter of a vLLM that is none, and the file that says how many of its servers will fail."""
    lives = tmp_path / "lives"
    monkeypatch.setenv("FAKE_VLLM_LIVES", str(lives))
    lives.write_text("0")
    return fake_python(tmp_path), lives


@pytest.mark.parametrize("fails", [2, 9])
def test_serve_starts_again_what_ended(fake, tmp_path, monkeypatch, fails):
    python, lives = fake
    lives.write_text(str(fails))
    monkeypatch.setattr(cli_lvlm, "_FIRST", 0.01)
    monkeypatch.setenv("EMOLOOP_LVLM__VLLM_PYTHON", str(python))
    monkeypatch.setenv("EMOLOOP_HOME", str(tmp_path / "home"))
    watch = cli_lvlm._watch

    def until_it_runs_well(*words):
        if fails == 2 and lives.read_text() == "0":
            raise KeyboardInterrupt
        return watch(*words)

    monkeypatch.setattr(cli_lvlm, "_watch", until_it_runs_well)
    folder = tiny_lvlm.build(tmp_path / "m")
    line = ["lvlm", "serve", str(folder), "--port", "0", "--device", "cpu"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        done = CliRunner().invoke(app, line)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    ended = min(fails, cli_lvlm._RESTARTS + 1)
    assert done.output.count("ended by itself with exit code 3: ValueError: the engine is dead") == ended
    assert done.output.count("starting it again in") == min(fails, cli_lvlm._RESTARTS)
    assert "[core.py:54] ValueError: the engine is dead" in done.output  # passed on from the log
    assert done.exit_code == (0 if fails == 2 else 1)
    assert ("stopping vLLM" if fails == 2 else f"ended {ended} times in a row") in done.output


async def test_a_server_of_ones_own(fake, tmp_path, caplog):
    python, _ = fake
    folder = str(tiny_lvlm.build(tmp_path / "m"))
    settings = LVLMSettings(engine="vllm-offline", model=folder, vllm_python=str(python), device="cpu")
    model = load_lvlm(settings)
    assert isinstance(model, VLLMOffline)
    assert "starting vLLM" in caplog.text
    try:
        answers = await asyncio.gather(*(model.ainvoke("x") for _ in range(8)))
        assert {answer.content for answer in answers} == {"ok"}
        first = psutil.Process(model._own._child.process.pid)
        [served] = first.children()
        served.kill()
        first.wait()
        answers = await asyncio.gather(*(model.ainvoke("x") for _ in range(8)))
        assert {answer.content for answer in answers} == {"ok"}
        tree = psutil.Process(model._own._child.process.pid)
        tree = [tree, *tree.children(recursive=True)]
        log = model._own.log
        assert log.read_text().count("serving") == 2  # one each, whoever asked
    finally:
        model.close()
    assert not [process for process in tree if process.is_running()]
    assert not log.exists()
    assert model.invoke("x").content == "ok"
    model.close()


async def test_a_server_of_ones_own_that_cannot_start_says_why(tmp_path):
    folder = tiny_lvlm.build(tmp_path / "m")
    python = fake_python(tmp_path, 'echo "ValueError: No room for the cache"\nexit 4')
    settings = LVLMSettings(engine="vllm-offline", model=str(folder), vllm_python=str(python), device="cpu")
    with pytest.raises(UserError, match="vLLM ended with exit code 4: ValueError: No room"):
        load_lvlm(settings)
    model = load_lvlm(settings, check=False)
    results = await asyncio.gather(*(model.ainvoke("x") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, UserError) for result in results)
    model.close()


async def test_closing_ends_a_start(tmp_path, monkeypatch):
    folder = tiny_lvlm.build(tmp_path / "m")
    python = fake_python(tmp_path, "exec sleep 600")
    settings = LVLMSettings(engine="vllm-offline", model=str(folder), vllm_python=str(python), device="cpu")
    model = load_lvlm(settings, check=False)
    assert isinstance(model, VLLMOffline)
    started = asyncio.Event()
    tell = asyncio.get_running_loop().call_soon_threadsafe
    monkeypatch.setattr(VLLMServer, "_healthy", lambda self: tell(started.set))
    waiting = asyncio.create_task(model.ainvoke("x"))
    await started.wait()
    guard = psutil.Process(model._own._child.process.pid)
    await asyncio.to_thread(model.close)
    [result] = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(result, BaseException)
    assert not guard.is_running()


def test_a_taken_port(tmp_path):
    import socket

    folder = tiny_lvlm.build(tmp_path / "m")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another by --port"):
            VLLMServer(str(folder), python=Path(sys.executable), port=taken.getsockname()[1], device="cpu")


def test_finding_vllm(tmp_path, monkeypatch):
    assert vllm_server.find_python(sys.executable) == Path(sys.executable)
    with pytest.raises(UserError, match="not an interpreter"):
        vllm_server.find_python(str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vllm_install.interpreter() is None
    with pytest.raises(UserError, match="emoloop lvlm install"):
        vllm_server.find_python()
    home = vllm_install.folder()
    assert home.parent == tmp_path / "emoloop"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    assert vllm_install.interpreter() is None  # an installation that was interrupted
    (home / "complete").touch()
    assert vllm_server.find_python() == home / "bin" / "python"
    assert vllm_install.install() == home / "bin" / "python"  # found, not made again


def test_the_environment_is_named_after_its_lock(tmp_path, monkeypatch):
    before = vllm_install.folder(tmp_path)
    lock = tmp_path / "requirements.txt"
    lock.write_text(vllm_install.REQUIREMENTS.read_text() + "another==1.0\n")
    monkeypatch.setattr(vllm_install, "REQUIREMENTS", lock)
    assert vllm_install.folder(tmp_path) != before


def test_the_shim_steps_aside():
    code = (
        "import sys, emoloop.tools.vllm.shim as shim\n"
        "assert any(isinstance(f, shim.DeclareOperators) for f in sys.meta_path)\n"
        "try:\n    import torchvision\nexcept ImportError:\n    pass\n"
        "assert not any(isinstance(f, shim.DeclareOperators) for f in sys.meta_path)\n"
        # Beside a CUDA build of torch, torchvision's own operators are there.
        "import torch\nassert torch.version.cuda or torch.ops.torchvision.nms\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
