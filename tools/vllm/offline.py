"""Chat with vLLM without a server: `vllm.LLM` in a child process, for batch jobs of thousands of critiques.

The child runs in vLLM's own interpreter and speaks JSON lines. To everybody else it is one more chat model.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from pydantic import ConfigDict, Field, PrivateAttr

from ..lvlm.chat import continues, to_openai, to_result, with_layout
from .server import GuardedProcess, engine_options, environment, find_python, has_gpu, log_reason

CHILD = Path(__file__).with_name("offline_child.py")


class VLLMOffline(BaseChatModel):
    """Chat with a vLLM engine of one's own; it starts with the first request.

    Understands, by `.bind(...)` or per call: `response_format` ({"type": "json_schema", ...}), `temperature`,
    `seed`, `max_tokens`, `structured_outputs` ({"regex": …}), `logprobs`, `top_logprobs`. A chat that ends
    with an AIMessage is continued. Many calls at once make it fast.

    Attributes:
        model: Folder or hub id.
        python: vLLM's interpreter; found as `emoloop lvlm serve` finds it when None.
        temperature: 0 is greedy.
        max_tokens: Length limit of an answer.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" is the model's own on a GPU and float32 on a CPU.
        context: Tokens of prompt and answer; by default the model's, at most 8192.
        tensor_parallel: GPUs that share the model.

    Raises:
        RuntimeError: From calls: the engine did not start, ended, or refused the request; with its reason.
        UserError: From calls: vLLM is not installed.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    python: str | None = None
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    device: str = "auto"
    dtype: str = "auto"
    context: int | None = None
    tensor_parallel: int = 1

    _engine: _Engine | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def _llm_type(self) -> str:
        return "emoloop-vllm-offline"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    def close(self) -> None:
        """End the engine; the next call starts another."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _submit(self, messages: list[BaseMessage], **kwargs: Any) -> Future[ChatResult]:
        response_format = with_layout(kwargs.get("response_format"))
        structured = kwargs.get("structured_outputs")
        if response_format and response_format.get("type") == "json_schema":
            structured = {"json": response_format["json_schema"]["schema"]}
        temperature = kwargs.get("temperature")
        request = {
            "messages": to_openai(messages),
            "continues": continues(messages),
            "structured": structured,
            "temperature": self.temperature if temperature is None else float(temperature),
            "seed": kwargs.get("seed"),
            "max_tokens": int(kwargs.get("max_tokens") or self.max_tokens),
            "logprobs": int(kwargs.get("top_logprobs") or 0) if kwargs.get("logprobs") else None,
        }
        with self._lock:
            if self._engine is None or not self._engine.alive():
                self._engine = self._start()
            return self._engine.submit(request)

    def _start(self) -> _Engine:
        python = find_python(self.python)
        gpu = has_gpu(python) if self.device == "auto" else self.device != "cpu"
        options = engine_options(self.model, gpu=gpu, dtype=self.dtype, context=self.context)
        options |= {"model": self.model, "tensor_parallel_size": self.tensor_parallel}
        variables = environment(self.model, gpu=gpu)
        if not gpu:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process less to start; nothing to overlap
        return _Engine(self.model, python, options, variables)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._submit(messages, **kwargs).result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await asyncio.wrap_future(await asyncio.to_thread(self._submit, messages, **kwargs))


class _Engine:
    """The child and the requests that it has not answered yet."""

    def __init__(self, model: str, python: Path, options: dict[str, Any], variables: dict[str, str]):
        self.model = model
        self.log = Path(tempfile.mkstemp(prefix="emoloop-vllm-", suffix=".log")[1])
        with self.log.open("wb") as errors:
            self.child = GuardedProcess(
                [str(python), str(CHILD), json.dumps(options)],
                python=python,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.numbers = itertools.count()
        self.waiting: dict[int, Future[ChatResult]] = {}
        self.lock = threading.Lock()
        self.ended = False
        self.reader = threading.Thread(target=self._read, name="emoloop-vllm-offline", daemon=True)
        self.reader.start()

    def alive(self) -> bool:
        return not self.ended

    def submit(self, request: dict[str, Any]) -> Future[ChatResult]:
        future: Future[ChatResult] = Future()
        number = next(self.numbers)
        line = json.dumps({"id": number, **request}) + "\n"
        with self.lock:
            if self.ended:
                future.set_exception(RuntimeError(f"vLLM ended: {log_reason(self.log)} ({self.log})"))
                return future
            self.waiting[number] = future
            stdin = self.child.process.stdin
            assert stdin is not None
            with suppress(OSError):  # it has ended; the reader sees that too and answers for it
                stdin.write(line)
                stdin.flush()
        return future

    def _read(self) -> None:
        stdout = self.child.process.stdout
        assert stdout is not None
        for line in stdout:
            reply = json.loads(line)
            if "id" not in reply:
                continue
            with self.lock:
                future = self.waiting.pop(reply.pop("id"))
            if not future.set_running_or_notify_cancel():
                continue
            if "error" in reply:
                future.set_exception(RuntimeError(f"vLLM refused the request: {reply['error'][:300]}"))
            else:
                text = reply.pop("text")
                future.set_result(to_result(text, model=self.model, **reply))
        with self.lock:
            self.ended = True
            left, self.waiting = self.waiting, {}
        reason = f"vLLM ended: {log_reason(self.log)} ({self.log})"
        for future in left.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(reason))

    def close(self) -> None:
        stdin = self.child.process.stdin
        assert stdin is not None
        with self.lock:
            self.ended = True
            with suppress(OSError):
                stdin.close()  # the child ends when its input does
        self.child.stop()
        self.reader.join()
        self.log.unlink(missing_ok=True)
