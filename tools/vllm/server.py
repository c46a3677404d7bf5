"""A vLLM server as a child process, with the flags that suit critics and rewriters.

What the flags are for: the structured-output backend "guidance" is the one that keeps every answer valid and
that the embedded engine uses too; prefix caching with small blocks lets a short rubric be reused; one image a
prompt bounds memory; the model's own sampling defaults stay out, so that temperature 0 is plain greedy.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ...domain import UserError
from .. import presets
from . import install as vllm_install

GUARD = Path(__file__).with_name("guard.py")

#: Kept out of every vLLM process: usage reports, and lookups on the hub for a model that lies in a folder.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_COLOR": "0"}

#: Longest context that critics and rewriters need: rubric, picture, rounds so far, answer.
CONTEXT = 8192


@dataclass(frozen=True)
class GPUPreset:
    """How a well-known model is served on GPUs.

    Attributes:
        pattern: Regular expression on the model's name.
        pixels: Most pixels of an image; more cost tokens and tell a critic little.
        flags: Further flags.
    """

    pattern: str
    pixels: int
    flags: tuple[str, ...] = field(default=())


#: 1280 image tokens of 28 x 28 (Qwen2.5-VL) or 32 x 32 (Qwen3-VL) pixels. With tensor parallelism the small
#: vision tower runs whole on each GPU over its share of the images, which beats cutting it up.
GPU_PRESETS = (
    GPUPreset(r"qwen2[._]?5-?vl", 1280 * 28 * 28),
    GPUPreset(r"qwen3-?vl.*(a3b|a22b|moe)", 1280 * 32 * 32, ("--enable-expert-parallel",)),
    GPUPreset(r"qwen3-?vl", 1280 * 32 * 32),
)


def find_python(setting: str | None = None) -> Path:
    """The interpreter of vLLM's environment.

    Args:
        setting: `lvlm.vllm_python`.

    Returns:
        That one; else the environment that `emoloop lvlm install` made; else this one where it holds vLLM.

    Raises:
        UserError: None of these.
    """
    if setting:
        python = Path(setting).expanduser()
        if not os.access(python, os.X_OK):
            raise UserError(f"lvlm.vllm_python: {setting} is not an interpreter")
        return python
    if installed := vllm_install.interpreter():
        return installed
    from importlib.util import find_spec

    if find_spec("vllm"):
        return Path(sys.executable)
    raise UserError(
        "vLLM is not installed: `emoloop lvlm install` makes an environment for the CPU; on a GPU install "
        "the extra (pip install 'emoloop[vllm]') in an environment of its own and set lvlm.vllm_python"
    )


def has_gpu(python: Path) -> bool:
    """Whether vLLM in that environment would run on a GPU."""
    ask = "import torch; print(bool(torch.version.cuda or torch.version.hip) and torch.cuda.is_available())"
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "True"


def _gpu_preset(model: str) -> GPUPreset | None:
    return next((preset for preset in GPU_PRESETS if re.search(preset.pattern, model.lower())), None)


def engine_options(
    model: str, *, gpu: bool, dtype: str = "auto", context: int | None = None
) -> dict[str, Any]:
    """What `vllm.LLM` and `vllm serve` are told alike, as `vllm.LLM`'s keyword arguments.

    Args:
        model: Folder or hub id.
        gpu: For a GPU, or for a CPU.
        dtype: "auto" is the model's own on a GPU and float32 on a CPU, where it is the fastest.
        context: Tokens of prompt and answer; by default the model's, at most 8192.
    """
    config = Path(model) / "config.json"
    if context is None:
        text = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        text = text.get("text_config", text)
        context = min(CONTEXT, text.get("max_position_embeddings") or CONTEXT)
    options: dict[str, Any] = {
        "dtype": dtype if dtype != "auto" or gpu else "float32",
        "max_model_len": context,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 1},
        "generation_config": "vllm",
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if gpu and (preset := _gpu_preset(model)):
        options["mm_processor_kwargs"] = {"max_pixels": preset.pixels}
        options["limit_mm_per_prompt"] = {"image": 1, "video": 0}
    if not gpu:
        # The CPU backend takes multiples of 32 only. Compiling costs a minute and gains little at these
        # sizes.
        options |= {"block_size": 32, "enforce_eager": True, "mm_processor_cache_gb": 1}
    return options


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

    Args:
        model: Folder or hub id.
        python: vLLM's interpreter.
        host: Address to listen on.
        port: Port to listen on.
        names: What clients may call the model.
        gpu: For a GPU, or for a CPU.
        dtype: As in `engine_options`.
        context: As in `engine_options`.
        seats: Requests in one batch at most.
        tensor_parallel: GPUs that share one copy of the model.
        data_parallel: Copies of the model.
        extra: Flags as they are; they come last, so they win.
    """
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "max-num-seqs": seats,
        "enable-prompt-tokens-details": True,
    }
    if tensor_parallel > 1:
        flags |= {"tensor-parallel-size": tensor_parallel, "mm-encoder-tp-mode": "data"}
    if data_parallel > 1:
        flags["data-parallel-size"] = data_parallel
    for key, value in engine_options(model, gpu=gpu, dtype=dtype, context=context).items():
        flags[key.replace("_", "-")] = value
    line = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", *names]
    for key, value in flags.items():
        if value is True:
            line.append(f"--{key}")
        else:
            line += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    if gpu and (preset := _gpu_preset(model)):
        line += preset.flags
    return [*line, *extra]


def environment(model: str, *, gpu: bool) -> dict[str, str]:
    """The environment of a vLLM process."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= QUIET
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a small model needs no more
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


class GuardedProcess:
    """A command that ends when this process does, however it does.

    Attributes:
        process: The guard; its exit code is the command's.
    """

    def __init__(self, line: Sequence[str], *, python: Path, env: dict[str, str], **streams: Any):
        read, self._write = os.pipe()
        try:
            self.process = subprocess.Popen(
                [str(python), "-S", str(GUARD), str(read), *line],
                pass_fds=(read,),
                start_new_session=True,  # Ctrl-C is ours to handle
                env=env,
                **streams,
            )
        finally:
            os.close(read)

    def stop(self) -> int:
        """Let go of the pipe and wait until nothing is left; may be called twice. Returns the exit code."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1
        return self.process.wait()


class VLLMServer:
    """A running server; a context manager.

    Attributes:
        url: Base URL for clients, ending in /v1.
        names: What clients may call the model.
        log: File with everything that the server prints.
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
        """Prepare a server; `start` starts it.

        Args:
            model: Preset, folder or hub id.
            python: vLLM's interpreter; found by `find_python` when None.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            device: "auto", "cpu" or "cuda".
            log: Where the server's output goes; a temporary file when None.
            **options: As for `command`: dtype, context, seats, tensor_parallel, data_parallel, extra.

        Raises:
            UserError: Unknown model, no vLLM, or a port that is taken.
        """
        self.model = str(presets.resolve(model, "lvlm"))
        self.names = list(dict.fromkeys([model, self.model]))
        self.python = python or find_python()
        self.gpu = has_gpu(self.python) if device == "auto" else device != "cpu"
        self.host, self.port = host, _free_port(host, port)
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}/v1"
        self.log = log or Path(tempfile.mkstemp(prefix="emoloop-vllm-", suffix=".log")[1])
        self._line = command(
            self.model,
            python=self.python,
            host=host,
            port=self.port,
            names=self.names,
            gpu=self.gpu,
            **options,
        )
        self._child: GuardedProcess | None = None

    def start(
        self, timeout: float = 900.0, progress: Callable[[str], None] = lambda line: None
    ) -> VLLMServer:
        """Start and wait until the server is healthy.

        Args:
            timeout: Seconds to wait.
            progress: Called about once a second with a line such as "vLLM: 12 s: Loading model weights".

        Raises:
            UserError: The server ended or did not get ready in time; with the line of its log that says why.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._child = GuardedProcess(
                self._line,
                python=self.python,
                env=environment(self.model, gpu=self.gpu),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started = time.monotonic()
        try:
            while not self._healthy():
                waited = time.monotonic() - started
                if (code := self._child.process.poll()) is not None:
                    raise UserError(
                        f"vLLM ended with exit code {code}: {log_reason(self.log)} (all of it: {self.log})"
                    )
                if waited > timeout:
                    raise UserError(
                        f"vLLM was not ready after {timeout:g} s: {_last_line(self.log)} ({self.log})"
                    )
                progress(f"vLLM: {waited:.0f} s: {_last_line(self.log)}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
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
        """Wait until the server ends by itself and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It is still running.
        """
        assert self._child is not None, "start first"
        return self._child.process.wait(timeout)

    def stop(self) -> None:
        """End the server and all its workers; return when they are gone."""
        if self._child is not None:
            self._child.stop()

    def __enter__(self) -> VLLMServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def metrics(url: str, api_key: str = "none") -> dict[str, float]:
    """The server's counters and gauges, summed over labels.

    Args:
        url: Base URL, with or without /v1.
        api_key: Sent as a bearer token.

    Returns:
        Name → value, such as "vllm:prefix_cache_hits_total".
    """
    headers = {"Authorization": f"Bearer {api_key}"}
    page = httpx.get(
        url.rstrip("/").removesuffix("/v1") + "/metrics", headers=headers, timeout=10, trust_env=False
    )
    page.raise_for_status()
    found: dict[str, float] = {}
    for line in page.text.splitlines():
        if not line.startswith("#") and " " in line:
            name, value = re.split(r"[{ ]", line, maxsplit=1)[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def prefix_hits(after: dict[str, float], before: dict[str, float] | None = None) -> tuple[float, float]:
    """(prompt tokens from the prefix cache, prompt tokens asked for) between two calls of `metrics`."""
    hits, asked = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    before = before or {}
    return after.get(hits, 0.0) - before.get(hits, 0.0), after.get(asked, 0.0) - before.get(asked, 0.0)


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


def _lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 40_000))
        text = file.read().decode(errors="replace")
    # "(APIServer pid=1) INFO 11-21 16:32:06 [file.py:54] text" → "text"
    return [
        re.sub(r"^(\(.*?\) )?([A-Z]+ [\d-]+ [\d:.]+ )?(\[.*?\] )?", "", line).strip()
        for line in text.splitlines()
    ]


def _last_line(log: Path) -> str:
    return next((line[:100] for line in reversed(_lines(log)) if line), "starting")


def log_reason(log: Path) -> str:
    """The last exception that says something; vLLM ends with one that only points at the others."""
    errors = [line for line in _lines(log) if re.match(r"[\w.]*(Error|Exception|error): .", line)]
    telling = [line for line in errors if "Engine core initialization failed" not in line]
    return (telling or errors or [_last_line(log)])[-1][:300]
