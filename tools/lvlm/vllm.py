"""A chat model on one or several vLLM servers, or on one of its own: one semaphore, one retry layer.

A server that restarts must cost a run nothing but time, and a server that stays away must not cost it much: what
counts is how long the *server* has been away, not how often one request has tried. Requests made after that patience
is used up get one try each.

All requests run on one event loop in a thread of their own, so that connections outlive the caller's loops
(notebooks, several `asyncio.run`) and work from synchronous code too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatResult
from PIL import Image
from pydantic import Field, PrivateAttr, SecretStr

from ...domain import Failure, UserError
from .. import presets
from ..urls import base_urls, client, receive, redact
from ..vllm.server import VLLMServer, find_python
from .chat import LocalChat, image_url, to_openai, to_result, with_layout

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: The server is there and asks for another try; so do all 5xx.
TRY_AGAIN = {408, 409, 429}

#: Tries that tell a hiccup of a server that is there from a request that it can't do.
TRIES_AT_500 = 6

#: Back-off in seconds: first step, cap, and the longest Retry-After that is waited for.
FIRST, CAP, LONGEST = 0.5, 8.0, 60.0

#: Seconds of waiting that are worth a word, and until it is said again.
SAY, AGAIN = 3.0, 60.0


class LVLMUnavailable(Failure):
    """No answer was to be had; the message says why in one line."""


class _Bad(Exception):
    """An answer that says no, or (without a code) one that cannot be read."""

    def __init__(self, text: str, code: int | None = None, retry_after: str = ""):
        super().__init__(text)
        self.code, self.retry_after = code, retry_after
        self.away = code in (502, 503, 504)  # a gateway before nobody; any other kind of error means the same
        self.passes = code is None or code in TRY_AGAIN or code >= 500


@dataclass
class _Server:
    url: str
    client: httpx.AsyncClient
    name: str  # what it calls the model
    busy: int = 0
    #: When it was first found away (None while it is there), and until when it is not asked again.
    away_since: float | None = None
    avoid_until: float = 0.0


@dataclass
class _Try:
    """One request over all its tries: a chat, or (without a body) which models are served."""

    body: dict[str, Any] | None
    server: _Server  # asked last; a check asks no other
    checking: bool = False
    started: float = field(default_factory=time.monotonic)


class VLLMChat(LocalChat):
    """Chat with vLLM servers; of several, the least busy one gets a request. Its fields are those of `LVLMSettings`.

    Calls raise `LVLMUnavailable`, or `UserError` where URL or key cannot be used.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    api_key: SecretStr = SecretStr("none")
    timeout: float = Field(default=120.0, gt=0)
    patience: float = Field(default=300.0, ge=0)
    concurrency: int = Field(default=16, ge=1)

    _loop: asyncio.AbstractEventLoop | None = PrivateAttr(default=None)
    _servers: list[_Server] = PrivateAttr(default_factory=list)
    _slots: asyncio.Semaphore = PrivateAttr()
    _silent_until: float = PrivateAttr(default=0.0)

    @property
    def urls(self) -> list[str]:
        """The servers' base URLs."""
        return base_urls(self.base_url, "lvlm.base_url")

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                # `concurrency` bounds connections, the limit of a try bounds all its waits.
                limits = httpx.Limits(max_keepalive_connections=self.concurrency)
                key, options = self.api_key.get_secret_value(), {"timeout": None, "limits": limits}
                self._servers = [_Server(url, client(url, key, **options), self.model) for url in self.urls]
                self._slots = asyncio.Semaphore(self.concurrency)
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run_to_the_end, args=(self._loop,), name="emoloop-vllm", daemon=True
                ).start()
            return self._loop

    async def _ready(self) -> None:
        """Awaited before each try."""

    def _call(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        loop = self._start()
        return asyncio.run_coroutine_threadsafe(work(), loop)

    def close(self) -> None:
        """Close the connections and end the thread; the next call starts anew."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return

        async def shut() -> None:
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            for server in self._servers:
                await server.client.aclose()

        asyncio.run_coroutine_threadsafe(shut(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)

    def _submit(self, messages: list[BaseMessage], **kwargs: Any) -> Future[ChatResult]:
        body = {"temperature": self.temperature, "max_tokens": self.max_tokens, **kwargs}
        body["messages"] = to_openai(messages)
        body["response_format"] = with_layout(kwargs.get("response_format"))
        if isinstance(messages[-1], AIMessage):
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        body = {key: value for key, value in body.items() if value is not None}
        return self._call(lambda: self._persist(_Try(body, self._servers[0])))

    async def _persist(self, attempt: _Try) -> Any:
        tries = 0
        while True:
            tries += 1
            try:
                return await self._once(attempt)
            except (httpx.TransportError, TimeoutError, _Bad) as error:
                if self._enough(attempt, error, tries):
                    raise LVLMUnavailable(self._explain(attempt, error)) from error
                pause, now = self._pause(error, tries), time.monotonic()
                if now - attempt.started + pause >= SAY and now >= self._silent_until:
                    self._silent_until = now + AGAIN
                    logger.warning("%s; waiting up to %g s", self._explain(attempt, error), self.patience)
                await asyncio.sleep(pause)

    async def _once(self, attempt: _Try) -> Any:
        async with self._slots:
            await self._ready()
            now = time.monotonic()
            if not attempt.checking:
                there = [s for s in self._servers if s.away_since is None or now >= s.avoid_until]
                attempt.server = min(there or self._servers, key=lambda server: server.busy)
            server = attempt.server
            server.busy += 1
            try:
                # The client's own timeout would begin anew with every byte; this one is for the whole answer.
                async with asyncio.timeout(self.timeout):
                    result = await _answer(server, attempt.body)
                server.away_since = None
                return result
            except (httpx.TransportError, TimeoutError, _Bad) as error:
                server.avoid_until = (now := time.monotonic()) + CAP
                server.away_since = (server.away_since or now) if getattr(error, "away", True) else None
                raise
            finally:
                server.busy -= 1

    def _pause(self, error: Exception, tries: int) -> float:
        if isinstance(error, _Bad) and (asked := _seconds(error.retry_after)) is not None:
            return min(asked, LONGEST) * random.uniform(1.0, 1.1)
        if getattr(error, "away", True) and any(server.away_since is None for server in self._servers):
            return 0.0  # another server is there
        return min(CAP, FIRST * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)

    def _enough(self, attempt: _Try, error: Exception, tries: int) -> bool:
        if isinstance(error, _Bad):
            if not error.passes:
                return True
            if error.code not in TRY_AGAIN and not error.away:
                return tries >= TRIES_AT_500
        elif attempt.checking or "[SSL" in str(error):
            return True  # more often a wrong address than a restart
        now = time.monotonic()
        since = [server.away_since for server in self._servers if server.away_since is not None]
        nobody_for = now - max(since) if len(since) == len(self._servers) else 0.0
        return max(nobody_for, now - attempt.started) >= self.patience

    def _explain(self, attempt: _Try, error: Exception) -> str:
        url, said = redact(attempt.server.url), redact(" ".join(str(error).split()))[:200]
        tried = f"tried for {time.monotonic() - attempt.started:.0f} s"
        if isinstance(error, TimeoutError):
            return f"the LVLM server at {url} hangs: no answer in {self.timeout:g} s, {tried}"
        if isinstance(error, httpx.ConnectError) and "[SSL" not in said:
            hint = f"start one with `emoloop lvlm serve {self.model}` or name another by lvlm.base_url"
            return f"no LVLM server at {url}, {tried}: {said}; {hint} (EMOLOOP_LVLM__BASE_URL)"
        if not isinstance(error, _Bad):
            hint = f"does it speak {'http' if url.startswith('https') else 'https'}://?"
            if "CERTIFICATE_VERIFY_FAILED" in said:
                hint = "its certificate is not trusted: name the issuer's by SSL_CERT_FILE"
            return f"no connection to the LVLM server at {url}, {tried}: {said}; {hint}"
        word = {
            None: "sends unreadable answers",
            401: "does not take lvlm.api_key (401)",
            404: f"does not serve {self.model!r} there (404)",
            429: "is overloaded (429)",
        }.get(error.code, f"answered {error.code}")
        hint = "" if url.endswith("/v1") else "; a base URL usually ends in /v1"
        return f"the LVLM server at {url} {word}, {tried}: {said}{hint}"

    def check(self, images: bool = True) -> None:
        """Ask the servers whether they are there, serve the model and take images; of several, one suffices.

        A server that is there and asks for patience (429, 503) gets it, as in a run.

        Args:
            images: Whether they must take images.

        Raises:
            UserError: In one line, with what to do.
        """

        async def problems() -> list[str | None]:
            await self._ready()
            return await asyncio.gather(*(self._problem(it, images) for it in self._servers))

        found = self._call(problems).result()
        if all(found):
            raise UserError(found[0])

    async def _problem(self, server: _Server, images: bool) -> str | None:
        names, url = [self.model], redact(server.url)
        with suppress(UserError):
            names.append(str(presets.resolve(self.model, "lvlm")))
        picture = {"type": "image_url", "image_url": {"url": image_url(Image.new("RGB", (64, 64), "teal"))}}
        body = {"messages": to_openai([HumanMessage([picture])]), "max_tokens": 1, "temperature": 0.0}
        try:
            served = await self._persist(_Try(None, server, checking=True))
            if not (known := [name for name in names if name in served]):
                return (
                    f"the server at {url} serves {', '.join(map(repr, served)) or 'nothing'}, not {self.model!r}: "
                    f"set lvlm.model to what it serves, or start the right one with `emoloop lvlm serve {self.model}`"
                )
            server.name = known[0]
            if images:
                await self._persist(_Try(body, server, checking=True))
        except LVLMUnavailable as error:
            if getattr(error.__cause__, "code", 0) != 400:
                return str(error)
            return (
                f"{self.model!r} at {url} takes no images, and a critic must see: serve a vision-language model "
                f"(the server says: {error.__cause__})"
            )
        return None


class VLLMOffline(VLLMChat):
    """The same with a vLLM server of one's own: it starts with the first request and ends at `close`.

    Where it dies in between, the next try starts it again.
    """

    python: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    _own: VLLMServer | None = PrivateAttr(default=None)
    _starting: asyncio.Lock = PrivateAttr(default_factory=asyncio.Lock)

    @property
    def urls(self) -> list[str]:
        """The server's base URL."""
        if self._own is None:
            python = find_python(self.python)
            self._own = VLLMServer(self.model, python=python, device=self.device, dtype=self.dtype)
        return [self._own.url]

    async def _ready(self) -> None:
        async with self._starting:
            if (own := self._own) is not None and not own.running():
                logger.warning("starting vLLM for %s; its log: %s", self.model, own.log)
                await asyncio.to_thread(own.start)

    def close(self) -> None:
        """End the server too; the log of one that has ended by itself stays."""
        own, self._own = self._own, None
        if own is not None:
            well = own.running()
            own.stop()
            if well:
                own.log.unlink(missing_ok=True)
        super().close()
        self._starting = asyncio.Lock()  # the next one belongs to another event loop


def _run_to_the_end(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _answer(server: _Server, body: dict[str, Any] | None) -> Any:
    """The names of the models that are served, or the answer to a chat."""
    try:
        if body is None:
            answer = await receive(server.client, "GET", f"{server.url}/models")
        else:
            body["model"] = server.name
            answer = await receive(server.client, "POST", f"{server.url}/chat/completions", body)
    except (httpx.DecodingError, httpx.TooManyRedirects) as error:
        raise _Bad(str(error)) from error
    if not answer.is_success:
        found = re.search(r'"(?:message|detail)":\s*"(.+?)"\s*[,}]', answer.text)
        text = found[1] if found else answer.text
        raise _Bad(" ".join(text.split())[:200], answer.status_code, answer.headers["retry-after"])
    try:
        content = json.loads(answer.content)
        if body is None:
            return [str(entry["id"]) for entry in content["data"]]
        choice = content["choices"][0]
        return to_result(
            choice["message"]["content"] or "",
            model=server.name,
            finish_reason=choice["finish_reason"] or "stop",
            usage=content.get("usage") or {},
            logprobs=(choice.get("logprobs") or {}).get("content"),
        )
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise _Bad(f"{type(error).__name__}: {error}") from error


def _seconds(asked: str) -> float | None:
    """A Retry-After in seconds, given as a number or as a date; None where nothing is asked."""
    with suppress(ValueError):
        return max(0.0, float(asked))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    return None
