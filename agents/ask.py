"""Asking a chat model for one JSON object, and what can go wrong with that.

Models that take `response_format` get the schema, so their answers parse by construction; any other model
gets the prompt alone and its text is searched for the object. An answer that does not read well is sent back
once with the problem named; after that it is missing, with the reason and the raw text. Nothing is raised: a
failed judge is missing data, and the caller decides what that means.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel, ValidationError

from ..domain import Missing, UserError
from .schemas import cleaned, response_format

Answer = TypeVar("Answer", bound=BaseModel)

#: Characters of an answer that are read, and how much of an unreadable one is kept.
_READ_LIMIT, _RAW_LIMIT = 65_536, 2000

#: Braces that begin no object before the search ends: it must not become quadratic.
_FALSE_STARTS = 200


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """What came of one question.

    Attributes:
        answer: The answer, or why there is none.
        usage: Tokens, summed over the attempts: input_tokens, output_tokens, total_tokens.
        seconds: Wall-clock time.
        error: The exception where the model itself failed; None where it answered.
    """

    answer: Answer | Missing
    usage: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    error: Exception | None = None


def model_id(model: Any) -> str:
    """A chat model's name for the log."""
    inner: Any = getattr(model, "bound", model)
    for attribute in ("model_name", "model", "model_id"):
        if isinstance(name := getattr(inner, attribute, None), str) and name:
            return name
    return type(inner).__name__


def takes_schema(model: Any) -> bool:
    """Whether `.bind(response_format=…)` means something to the model: ours say so, OpenAI's clients all do."""
    inner = getattr(model, "bound", model)
    # Never imported for the question: a model of a library that is not loaded cannot be here.
    library = sys.modules.get("langchain_openai.chat_models.base")
    openai = library is not None and isinstance(inner, library.BaseChatOpenAI)
    return openai or getattr(inner, "takes_response_format", False)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(cleaned(str(error)).split())}".rstrip(": ")[:limit]


class Asker:
    """Asks one model; the slots are shared by all who use the model.

    Args:
        model: Any LangChain chat model.
        slots: Requests in flight at once.
        timeout: Seconds for one request; None leaves that to the model, as ours know better (a client that
            waits for a server to come back is not late).
        name: The model's name for the log; by default what it calls itself.
        variety: Temperature at which several different answers are asked for.
    """

    def __init__(
        self,
        model: BaseChatModel | Runnable[Any, BaseMessage],
        slots: int = 16,
        timeout: float | None = None,
        name: str | None = None,
        variety: float = 0.9,
    ):
        self.model = model
        self.variety = variety
        self.name = name or model_id(model)
        self.timeout = timeout
        self.slots = asyncio.Semaphore(slots)
        self._takes_schema = takes_schema(model)
        # A greedy model needs no seed, and some servers refuse one.
        self._samples = bool(getattr(getattr(model, "bound", model), "temperature", None))

    async def ask(
        self,
        messages: list[BaseMessage],
        kind: type[Answer],
        schema_name: str,
        schema: dict[str, Any],
        *,
        seed: int | None = None,
        **more: Any,
    ) -> Reply[Answer]:
        """One question, at most two attempts.

        Args:
            messages: The chat.
            kind: Reads the answer; a `ValueError` in it is a bad answer.
            schema_name: Name of the schema for the server.
            schema: JSON schema of the answer.
            seed: For models that sample; given only to those that take a schema, since others may refuse it.
            **more: `temperature` and `max_tokens` of this question; likewise.

        Raises:
            UserError: The model's own setting is wrong; all else ends as a `Missing`.
        """
        model: Any = self.model
        if self._takes_schema:
            if seed is not None and (self._samples or more.get("temperature")):
                more["seed"] = seed
            model = model.bind(response_format=response_format(schema_name, schema), **more)
        usage: dict[str, int] = {}
        started = time.perf_counter()
        raw: str | None = None
        problem = ""
        for _attempt in range(2):
            try:
                message = await self._call(model, messages)
            except UserError:
                raise
            except Exception as error:
                return Reply(
                    Missing(reason=self._reason(error), raw=raw), usage, time.perf_counter() - started, error
                )
            for key, value in (message.usage_metadata or {}).items():
                if isinstance(value, int):
                    usage[key] = usage.get(key, 0) + value
            text = str(message.text)
            raw = cleaned(text[:_RAW_LIMIT])
            try:
                return Reply(read(text, kind), usage, time.perf_counter() - started)
            except ValueError as error:
                problem = str(error)
            if message.response_metadata.get("finish_reason") == "length":
                problem = "it was cut at the length limit (lvlm.max_tokens)"
            messages = [
                *messages,
                AIMessage(raw or "(nothing)"),
                HumanMessage(f"That cannot be used: {problem}. Answer again with the JSON object only."),
            ]
        missing = Missing(reason=f"no usable answer after a second try: {problem}", raw=raw)
        return Reply(missing, usage, time.perf_counter() - started)

    async def _call(self, model: Any, messages: list[BaseMessage]) -> AIMessage:
        async with self.slots, asyncio.timeout(self.timeout):
            return await model.ainvoke(messages)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) and not str(error):
            return f"no answer within {self.timeout:g} s" if self.timeout else "no answer in time"
        return one_line(error)


def read(text: str, kind: type[Answer]) -> Answer:
    """Find and read the JSON object in a model's text.

    The last object that reads well counts: models that think aloud quote the form before they fill it in.

    Raises:
        ValueError: There is none, in words that help the model to do better.
    """
    if len(text) > _READ_LIMIT:
        raise ValueError(f"it is {len(text)} characters long, at most {_READ_LIMIT} are read")
    decoder = json.JSONDecoder(strict=False)
    false_starts = 0
    found: list[dict[str, Any]] = []
    start = text.find("{")
    while start >= 0 and false_starts < _FALSE_STARTS:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            false_starts += 1
            start = text.find("{", start + 1)
            continue
        found.append(value)
        start = text.find("{", end)
    problem = "there is no JSON object in it" if text.strip() else "it is empty"
    for value in reversed(found):
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            problem = cleaned("; ".join(_complaint(detail) for detail in error.errors()[:3]))[:500]
    raise ValueError(problem)


def _complaint(detail: Any) -> str:
    where = ".".join(map(str, detail["loc"])) or "the object"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
