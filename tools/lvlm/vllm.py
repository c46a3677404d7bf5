"""A chat model on one or several vLLM servers: one connection pool, one semaphore, one retry layer.

A server that restarts must cost a run nothing but time, and a server that stays away must not cost it much:
what counts is how long the *server* has been away, not how often one request has tried. Requests made after
that patience is used up get one try each. With several servers a run stays with one, because its prefix
cache holds the run's rubric and pictures, and moves when that one dies.

All requests run on one event loop in a thread of their own, so that the pool outlives the caller's loops
(notebooks, several `asyncio.run`) and works from synchronous code too.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import ensure_config
from langchain_openai import ChatOpenAI
from PIL import Image
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr
from tenacity import AsyncRetrying, RetryCallState

from ...domain import UserError
from .. import presets
from .chat import continues, image_url, with_layout

Result = TypeVar("Result")

#: The server is there and asks for another try; so do all 5xx.
TRY_AGAIN = {408, 409, 429}

#: A server that answers 500 to a request is there; this many tries tell a hiccup from a request that it
#: can't do.
TRIES_AT_500 = 6

#: Back-off in seconds: first step, cap, and the longest Retry-After that is waited for.
FIRST, CAP, LONGEST = 0.5, 8.0, 60.0


class LVLMUnavailable(RuntimeError):
    """No answer was to be had; the message says why in one line."""


@dataclass
class _Endpoint:
    url: str
    chat: ChatOpenAI
    busy: int = 0
    #: When it was first found away, and until when it is not asked again; None while it is there.
    away_since: float | None = None
    avoid_until: float = 0.0

    def score(self, key: str) -> bytes:
        return hashlib.blake2b(f"{key} {self.url}".encode(), digest_size=8).digest()


@dataclass
class _Try:
    """One request over all its tries."""

    messages: list[BaseMessage]
    arguments: dict[str, Any]
    key: str | None
    started: float = field(default_factory=time.monotonic)
    endpoint: _Endpoint | None = None


class VLLMChat(BaseChatModel):
    """Chat with vLLM servers.

    Understands, by `.bind(...)` or per call: `response_format` ({"type": "json_schema", ...}), `temperature`,
    `seed`, `max_tokens`, `structured_outputs` ({"regex": …}), `logprobs`, `top_logprobs`. A chat that ends
    with an AIMessage is continued. A run is known by `run_id` or `thread_id` in the metadata or the
    configurable part of its RunnableConfig; requests without go where the least is under way.

    Attributes:
        model: A name that the server gives the model, or a preset or folder that stands for one.
        base_url: URL ending in /v1, or several separated by commas.
        api_key: Sent as a bearer token.
        timeout: Seconds for one try.
        patience: Seconds that a server may be away before requests fail.
        concurrency: Tries in flight at once.
        temperature: 0 is greedy.
        max_tokens: Length limit of an answer.

    Raises:
        LVLMUnavailable: From calls: no answer, and why.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key: SecretStr = SecretStr("none")
    timeout: float = Field(default=120.0, gt=0)
    patience: float = Field(default=300.0, ge=0)
    concurrency: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)

    _loop: asyncio.AbstractEventLoop | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _endpoints: list[_Endpoint] = PrivateAttr(default_factory=list)
    _slots: asyncio.Semaphore | None = PrivateAttr(default=None)

    @property
    def _llm_type(self) -> str:
        return "emoloop-vllm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    @property
    def urls(self) -> list[str]:
        """The servers' base URLs."""
        return [url.strip().rstrip("/") for url in self.base_url.split(",") if url.strip()]

    def served_name(self) -> str:
        """What the first server calls the model; known after `check`."""
        self._start()
        return self._endpoints[0].chat.model_name

    # -- life ---------------------------------------------------------------------------------------------

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run_to_the_end, args=(self._loop,), name="emoloop-vllm", daemon=True
                ).start()
                self._slots = asyncio.Semaphore(self.concurrency)
                pool = openai.DefaultAsyncHttpxClient(
                    timeout=self.timeout,
                    trust_env=not all(map(_is_local, self.urls)),  # nobody's proxy leads to this machine
                )
                self._endpoints = [
                    _Endpoint(
                        url,
                        ChatOpenAI(
                            model=self.model,
                            base_url=url,
                            api_key=self.api_key,
                            max_retries=0,  # one retry layer, and it is ours
                            timeout=self.timeout,
                            http_async_client=pool,
                            use_responses_api=False,
                        ),
                    )
                    for url in self.urls
                ]
            return self._loop

    def _call(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._start())

    def close(self) -> None:
        """Close the connections and end the thread; the next call starts anew."""
        with self._lock:
            loop, self._loop = self._loop, None
            endpoints, self._endpoints = self._endpoints, []
        if loop is None:
            return

        async def shut() -> None:
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            if endpoints:
                await endpoints[0].chat.root_async_client.close()  # the pool is everybody's

        asyncio.run_coroutine_threadsafe(shut(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)

    # -- calls --------------------------------------------------------------------------------------------

    def _prepare(self, messages: list[BaseMessage], manager: Any, stop: Any, kwargs: dict[str, Any]) -> _Try:
        body = {"temperature": self.temperature, "max_tokens": self.max_tokens, **kwargs}
        if stop:
            body["stop"] = stop
        extra = dict(body.pop("extra_body", {}))
        if continues(messages):
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        if structured := body.pop("structured_outputs", None):
            extra["structured_outputs"] = structured
        # Beside the other fields, where ChatOpenAI would read the answer itself and trip over one that was
        # cut.
        if response_format := with_layout(body.pop("response_format", None)):
            extra["response_format"] = response_format
        body["extra_body"] = extra
        config = ensure_config()
        known = {**config.get("configurable", {}), **config.get("metadata", {})}
        known |= getattr(manager, "metadata", None) or {}
        key = next((str(known[name]) for name in ("run_id", "thread_id") if known.get(name)), None)
        return _Try(messages, body, key)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._call(self._persist(self._prepare(messages, run_manager, stop, kwargs))).result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await asyncio.wrap_future(
            self._call(self._persist(self._prepare(messages, run_manager, stop, kwargs)))
        )

    async def _persist(self, attempt: _Try) -> ChatResult:
        def error_of(state: RetryCallState) -> BaseException | None:
            return state.outcome.exception() if state.outcome else None

        try:
            async for turn in AsyncRetrying(
                retry=lambda state: _worth_another(error_of(state)),
                wait=lambda state: self._pause(error_of(state), state.attempt_number),
                stop=lambda state: self._enough(attempt, error_of(state), state.attempt_number),
                reraise=True,
            ):
                with turn:
                    return await self._once(attempt)
        except (openai.APIError, TimeoutError, _Unreadable) as error:
            raise LVLMUnavailable(self._explain(attempt, error)) from error
        raise AssertionError("unreachable: the last turn returns or raises")

    async def _once(self, attempt: _Try) -> ChatResult:
        assert self._slots is not None
        async with self._slots:
            endpoint = attempt.endpoint = self._choose(attempt.key)
            endpoint.busy += 1
            try:
                # The client's own timeout begins anew with every byte; this one is for the whole answer.
                async with asyncio.timeout(self.timeout):
                    result = await endpoint.chat._agenerate(attempt.messages, **attempt.arguments)
            except (openai.APIError, TimeoutError) as error:
                if _is_away(error):
                    now = time.monotonic()
                    endpoint.away_since = endpoint.away_since or now
                    endpoint.avoid_until = now + CAP
                else:
                    endpoint.away_since = None
                raise
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise _Unreadable(f"{type(error).__name__}: {error}") from error  # a body that is no answer
            finally:
                endpoint.busy -= 1
            endpoint.away_since = None
            return result

    def _choose(self, key: str | None) -> _Endpoint:
        """The run's endpoint by rendezvous hashing, among those that are there; else among all."""
        now = time.monotonic()
        there = [e for e in self._endpoints if e.away_since is None or now >= e.avoid_until]
        if key is None:
            return min(there or self._endpoints, key=lambda endpoint: endpoint.busy)
        return max(there or self._endpoints, key=lambda endpoint: endpoint.score(key))

    def _pause(self, error: BaseException | None, tries: int) -> float:
        if isinstance(error, openai.APIStatusError) and (asked := _retry_after(error)) is not None:
            return min(asked, LONGEST) * random.uniform(1.0, 1.1)
        if _is_away(error) and any(endpoint.away_since is None for endpoint in self._endpoints):
            return 0.0  # another server is there
        return min(CAP, FIRST * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)

    def _enough(self, attempt: _Try, error: BaseException | None, tries: int) -> bool:
        if isinstance(error, (openai.InternalServerError, _Unreadable)) and not _is_away(error):
            return tries >= TRIES_AT_500
        now = time.monotonic()
        since = [endpoint.away_since for endpoint in self._endpoints if endpoint.away_since is not None]
        nobody_for = now - max(since) if len(since) == len(self._endpoints) else 0.0
        return max(nobody_for, now - attempt.started) >= self.patience

    def _explain(self, attempt: _Try, error: Exception) -> str:
        where = attempt.endpoint.url if attempt.endpoint else self.base_url
        tried = f"tried for {time.monotonic() - attempt.started:.0f} s"
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"the LVLM server at {where} hangs: no answer in {self.timeout:g} s, {tried}"
        if isinstance(error, openai.APIConnectionError):
            return f"no LVLM server at {where}, {tried}: start one with `emoloop lvlm serve {self.model}`"
        if isinstance(error, openai.NotFoundError):
            return f"the LVLM server at {where} does not serve {self.model!r}: {_said(error)}"
        if isinstance(error, openai.RateLimitError):
            return f"the LVLM server at {where} is overloaded (429), {tried}: {_said(error)}"
        if isinstance(error, openai.APIStatusError):
            return f"the LVLM server at {where} answered {error.status_code}, {tried}: {_said(error)}"
        return f"the LVLM server at {where} sends unreadable answers, {tried}: {_said(error)}"

    # -- before a run -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Ask the servers whether they are there, serve the model and take images.

        Of several, one suffices; the others may come later.

        Raises:
            UserError: In one line, with what to do.
        """
        self._call(self._check()).result()

    async def _check(self) -> None:
        problems = []
        for endpoint in self._endpoints:
            try:
                async with asyncio.timeout(min(self.timeout, 30.0)):
                    page = await endpoint.chat.root_async_client.models.list()
                self._adopt_name(endpoint, [model.id for model in page.data])
                await self._see(endpoint)
            except (openai.APIConnectionError, TimeoutError):
                endpoint.away_since, endpoint.avoid_until = time.monotonic(), time.monotonic() + CAP
                problems.append(
                    f"no LVLM server answers at {endpoint.url}: start one with `emoloop lvlm serve "
                    f"{self.model}` or name another by lvlm.base_url (EMOLOOP_LVLM__BASE_URL)"
                )
            except openai.APIError as error:
                problems.append(
                    f"the server at {endpoint.url} does not answer like an LVLM's: {_said(error)}"
                )
        if len(problems) == len(self._endpoints):
            raise UserError(problems[0])

    def _adopt_name(self, endpoint: _Endpoint, served: list[str]) -> None:
        names = [self.model]
        with suppress(UserError):
            names.append(str(presets.resolve(self.model, "lvlm")))
        name = next((name for name in names if name in served), None)
        if name is None:
            raise UserError(
                f"the server at {endpoint.url} serves {', '.join(map(repr, served)) or 'nothing'}, not "
                f"{self.model!r}: set lvlm.model to what it serves, or start the right one with "
                f"`emoloop lvlm serve {self.model}`"
            )
        endpoint.chat.model_name = name

    async def _see(self, endpoint: _Endpoint) -> None:
        picture = {"type": "image_url", "image_url": {"url": image_url(Image.new("RGB", (64, 64), "teal"))}}
        try:
            async with asyncio.timeout(self.timeout):
                await endpoint.chat._agenerate([HumanMessage([picture])], max_tokens=1, temperature=0.0)
        except openai.BadRequestError as error:
            raise UserError(
                f"{self.model!r} at {endpoint.url} takes no images, and a critic must see: serve a "
                f"vision-language model (the server says: {_said(error)})"
            ) from error


def _run_to_the_end(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


class _Unreadable(Exception):
    """The server sent a body that is no chat completion."""


def _is_away(error: BaseException | None) -> bool:
    """Whether the error says that nobody is there: no connection, no answer, or a gateway before nobody."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (502, 503, 504)
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def _worth_another(error: BaseException | None) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in TRY_AGAIN or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError | _Unreadable)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait, given as a number or as a date; None where it asks nothing."""
    asked = error.response.headers.get("retry-after")
    if not asked:
        return None
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(text or error).split())[:200]


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
