"""Programs that emoloop is a guest of, each in the environment that `environments.py` made; else skipped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hosts.environments import program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@contextmanager
def running(
    name: str, command: str, *words: str, folder: Path, healthy: str, **variables: str
) -> Iterator[str]:
    """A server on a free port ("PORT" in words and variables), while it is needed; gives its address.

    What it says goes to `server.log`.
    """
    found = program(name, command)
    if found is None:
        pytest.skip(f"no {name}: python tests/hosts/environments.py")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    own = {key: value for key, value in os.environ.items() if not key.startswith(("EMOLOOP_", "OTEL_"))}
    line = [str(found), *(port if word == "PORT" else word for word in words)]
    own |= {key: port if it == "PORT" else it for key, it in variables.items()}
    with (folder / "server.log").open("wb") as log:
        child = subprocess.Popen(
            line,
            cwd=folder,
            env=own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1800):
            assert child.poll() is None, (folder / "server.log").read_text()[-4000:]
            try:
                if httpx.get(url + healthy, trust_env=False, timeout=10).is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
        assert child.poll() is None, "the server died"
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@pytest.fixture
def langgraph_dev(tmp_path):
    """Starts `langgraph dev` with the checkout's `langgraph.json`, or with another graph in it."""

    @contextmanager
    def start(graph: str | None = None) -> Iterator[str]:
        config = json.loads((ROOT / "langgraph.json").read_text())
        config["graphs"]["emoloop"] = graph or config["graphs"]["emoloop"]
        (tmp_path / "langgraph.json").write_text(json.dumps(config))
        # The server's own packages come first; ours, and what the checkout is installed with, after them.
        sites = [path for path in sys.path if path.endswith("site-packages")]
        code = (
            f"import site; [site.addsitedir(it) for it in {sites}]; from langgraph_cli.cli import cli; cli()"
        )
        with running(
            "langgraph",
            "python",
            *("-c", code, "dev", "--no-browser", "--no-reload", "--port", "PORT", "--n-jobs-per-worker", "8"),
            folder=tmp_path,
            healthy="/ok",
            EMOLOOP_HOME=str(tmp_path / "home"),
            PYTHONPATH=str(HERE.parent),
            LANGSMITH_TRACING="false",
            LANGGRAPH_CLI_NO_ANALYTICS="1",
            LANGGRAPH_NO_VERSION_CHECK="true",
        ) as url:
            yield url

    return start
