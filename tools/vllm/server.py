"""A vLLM server as a child process, with the flags that suit critics and rewriters.

The structured-output backend "guidance" keeps every answer valid and is the embedded engine's too; prefix caching
with small blocks lets a short rubric be reused; one image a prompt bounds memory; the model's own sampling defaults
stay out, so that temperature 0 is plain greedy.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from ...domain import UserError
from .. import presets
from ..children import GuardedProcess
from . import install as vllm_install

#: Kept out of every vLLM process: usage reports, and lookups on the hub for a model that lies in a folder.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_COLOR": "0"}

#: Longest context that critics and rewriters need: rubric, picture, rounds so far, answer.
CONTEXT = 8192

#: How well-known models are served on GPUs: a pattern of the name, most pixels of an image (more cost tokens and tell
#: a critic little: 1280 image tokens of 28 x 28 or 32 x 32 pixels), further flags.
GPU_PRESETS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    (r"qwen2[._]?5-?vl", 1280 * 28 * 28, ()),
    (r"qwen3-?vl.*(a3b|a22b|moe)", 1280 * 32 * 32, ("--enable-expert-parallel",)),
    (r"qwen3-?vl", 1280 * 32 * 32, ()),
)


def find_python(setting: str | None = None) -> Path:
    """The interpreter of vLLM's environment: the one that is set (`lvlm.vllm_python`), else the one of the environment
    that `emoloop lvlm install` made, else this one where it holds vLLM; else a `UserError`.
    """
    if setting:
        python = Path(setting).expanduser()
        if not os.access(python, os.X_OK):
            raise UserError(f"lvlm.vllm_python: {setting} is not an interpreter")
        return python
    if installed := vllm_install.interpreter():
        return installed
    if find_spec("vllm"):
        return Path(sys.executable)
    raise UserError(
        "vLLM is not installed: `emoloop lvlm install` makes an environment for the CPU; on a GPU install "
        "the extra (pip install 'emoloop[vllm]') in an environment of its own and set lvlm.vllm_python"
    )


def _has_gpu(python: Path) -> bool:
    ask = "import torch; print(bool(torch.version.cuda or torch.version.hip) and torch.cuda.is_available())"
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "True"


def command(
    model: str,
    *,
    python: Path,
    host: str,
    port: int,
    names: Sequence[str],
    gpu: bool,
    dtype: str = "auto",
    context: int | None = None,
    seats: int = 32,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of the server.

    `names` are what clients may call the model, `seats` the requests in one batch at most, `extra` flags as they are,
    which win. `dtype` "auto" is the model's own on a GPU and float32, the fastest, on a CPU; `context` counts tokens of
    prompt and answer, by default the model's and at most 8192.
    """
    if context is None:
        config = Path(model) / "config.json"
        text = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        text = text.get("text_config", text)
        context = min(CONTEXT, text.get("max_position_embeddings") or CONTEXT)
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "max-num-seqs": seats,
        "enable-prompt-tokens-details": True,
        "dtype": dtype if dtype != "auto" or gpu else "float32",
        "max-model-len": context,
        "enable-prefix-caching": True,
        "limit-mm-per-prompt": {"image": 1},
        "generation-config": "vllm",
        "structured-outputs-config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    more: tuple[str, ...] = ()
    if tensor_parallel > 1:
        # The small vision tower runs whole on each GPU over its share of the images, which beats cutting it up.
        flags |= {"tensor-parallel-size": tensor_parallel, "mm-encoder-tp-mode": "data"}
    if data_parallel > 1:
        flags["data-parallel-size"] = data_parallel
    if not gpu:
        # The CPU backend takes multiples of 32 only. Compiling costs a minute and gains little at these sizes.
        flags |= {"block-size": 32, "enforce-eager": True, "mm-processor-cache-gb": 1}
    elif preset := next((it for it in GPU_PRESETS if re.search(it[0], model.lower())), None):
        _, pixels, more = preset
        flags["mm-processor-kwargs"] = {"max_pixels": pixels}
        flags["limit-mm-per-prompt"] = {"image": 1, "video": 0}
    line = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", *names]
    for key, value in flags.items():
        line.append(f"--{key}")
        if value is not True:
            line.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return [*line, *more, *extra]


def _environment(model: str, gpu: bool) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        # GiB; a small model needs no more.
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", **variables, "CUDA_VISIBLE_DEVICES": ""}
    return variables | QUIET


class VLLMServer:
    """A server; a context manager that starts and stops it. Its `url` ends in /v1, `log` holds all that it prints.

    `model` is a preset, folder or hub id, `device` "auto", "cpu" or "cuda"; port 0 takes a free one; further options
    are those of `command`. An unknown model or a port that is taken is a `UserError`.
    """

    def __init__(
        self,
        model: str = "miniature",
        *,
        python: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        device: str = "auto",
        log: Path | None = None,
        **options: Any,
    ):
        self.model = str(presets.resolve(model, "lvlm"))
        self.names = list(dict.fromkeys([model, self.model]))
        self.python = python or find_python()
        self.host, self.port = host, _free_port(host, port)
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}/v1"
        self.log = log or Path(tempfile.mkstemp(prefix="emoloop-vllm-", suffix=".log")[1])
        self._device, self._options = device, options
        self._child: Any = None  # a GuardedProcess once it was started
        self._stopped = False

    def start(
        self, timeout: float = 900.0, progress: Callable[[str], None] = lambda line: None
    ) -> VLLMServer:
        """Start, or start again after it ended by itself, and wait until it is healthy, `timeout` seconds at most.

        `progress` gets lines such as "vLLM: 12 s: Loading model weights".

        Raises:
            UserError: The server ended or did not get ready in time; with the line of its log that says why.
        """
        gpu = _has_gpu(self.python) if self._device == "auto" else self._device != "cpu"
        where = {"python": self.python, "host": self.host, "port": self.port, "names": self.names}
        line = command(self.model, gpu=gpu, **where, **self._options)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb" if self._child is None else "ab") as output:
            self._child = GuardedProcess(
                line,
                python=self.python,
                env=_environment(self.model, gpu),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started = time.monotonic()
        try:
            while not self._healthy():
                waited, log = time.monotonic() - started, f"(all of it: {self.log})"
                news = (self.said() or ["starting"])[-1]
                if self._stopped:  # by another thread
                    raise UserError("vLLM was stopped before it was ready")
                if (code := self._child.process.poll()) is not None:
                    raise UserError(f"vLLM ended with exit code {code}: {self.reason()} {log}")
                if waited > timeout:
                    raise UserError(f"vLLM was not ready after {timeout:g} s: {news} {log}")
                progress(f"vLLM: {waited:.0f} s: {news}")
                time.sleep(0.5)
        except BaseException:
            self._child.stop()
            raise
        return self

    def _healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(self.url.removesuffix("/v1") + "/health", timeout=2, trust_env=False).is_success
        return False

    def running(self) -> bool:
        """Whether the server is there."""
        return self._child is not None and self._child.process.poll() is None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code of the server that ends by itself; `subprocess.TimeoutExpired` while it runs."""
        return self._child.process.wait(timeout)

    def stop(self) -> None:
        """End the server and all its workers, for good; return when they are gone."""
        self._stopped = True
        if self._child is not None:
            self._child.stop()

    def __enter__(self) -> VLLMServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def said(self) -> list[str]:
        """The last lines of the log, without vLLM's prefixes."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 40_000))
            text = file.read().decode(errors="replace")
        # "(APIServer pid=1) INFO 11-21 16:32:06 [file.py:54] text" → "text"
        prefix = r"^(\(.*?\) )?([A-Z]+ [\d-]+ [\d:.]+ )?(\[.*?\] )?"
        return [found[:300] for line in text.splitlines() if (found := re.sub(prefix, "", line).strip())]

    def reason(self) -> str:
        """The last exception that says something; vLLM ends with one that only points at the others."""
        errors = [line for line in self.said() if re.match(r"[\w.]*(Error|Exception|error): .", line)]
        telling = [line for line in errors if "Engine core initialization failed" not in line]
        return (telling or errors or self.said() or ["it said nothing"])[-1]


def metrics(url: str) -> dict[str, float]:
    """A server's counters and gauges, such as "vllm:prefix_cache_hits_total", summed over labels."""
    address = url.removesuffix("/v1") + "/metrics"
    page = httpx.get(address, timeout=10, trust_env=False).raise_for_status()
    found: dict[str, float] = {}
    for line in page.text.splitlines():
        if not line.startswith("#") and " " in line:
            name, value = re.split(r"[{ ]", line, maxsplit=1)[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def prefix_hits(after: dict[str, float], before: dict[str, float] | None = None) -> tuple[float, float]:
    """(prompt tokens from the prefix cache, prompt tokens asked for) between two calls of `metrics`."""
    names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    hits, asked = (after.get(name, 0.0) - (before or {}).get(name, 0.0) for name in names)
    return hits, asked


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another by --port"
            ) from None
        return probe.getsockname()[1]
