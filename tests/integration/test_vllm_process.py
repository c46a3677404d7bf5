"""Child processes, the server's flags and the installer, without vLLM itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_lvlm
from emoloop.domain import UserError
from emoloop.tools import children
from emoloop.tools.children import GuardedProcess
from emoloop.tools.vllm import install as vllm_install
from emoloop.tools.vllm import server as vllm_server
from emoloop.tools.vllm.server import VLLMServer, command

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
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        os.close(write)
        assert children.main(read, 0.3, [sys.executable, "-S", "-c", code]) in (130, 137)
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


def fake_python(tmp_path: Path, body: str) -> Path:
    """An "interpreter" whose `-m vllm…` does what `body` says; everything else it does as Python."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then\n{body}\nfi\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


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
        "import torch\nassert torch.ops.torchvision.nms\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
