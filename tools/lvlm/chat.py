"""What our chat models share: their base, messages in OpenAI's form, the JSON layout, an answer in LangChain's form.

The LVLM learns one layout of its JSON (`", "` and `": "`), and reads and writes it most surely in that layout. A
JSON schema says nothing about spaces, so the layout travels inside it, as the grammar engine's own key.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
import threading
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image
from pydantic import ConfigDict, Field, PrivateAttr

from ..images.base import encoded

#: llguidance's options, which every engine that uses it reads from the schema (ours, and vLLM's "guidance").
LAYOUT = {"x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}}

#: How chat models write their control tokens: <image>, <|im_start|>, </s>, [INST].
_CONTROL = re.compile(r"<(?=[^\s<>\d][^\s<>]*>|\|[^<>|]+\|>)|\[(?=/?[A-Z_]+\])")


class LocalChat(BaseChatModel):
    """A chat model whose answers are made elsewhere: in a thread that batches, or on a server.

    Understands, by `.bind(...)` or per call: `response_format` ({"type": "json_schema", ...}), `temperature`, `seed`,
    `max_tokens`, `structured_outputs` ({"regex": ...}, as vLLM has it), and `logprobs=True` with `top_logprobs=n`.
    A chat that ends with an AIMessage is continued. `model` is a folder, a hub id, or a server's name for it.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    takes_response_format: ClassVar[bool] = True

    model: str
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def _llm_type(self) -> str:
        return f"emoloop-{type(self).__name__}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    @abstractmethod
    def _submit(self, messages: list[BaseMessage], **kwargs: Any) -> Future[ChatResult]: ...

    @abstractmethod
    def close(self) -> None:
        """Give back what answering takes; the next call begins anew."""

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._submit(messages, stop=stop, **kwargs).result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # Decoding images and rendering the request is work: off the event loop, like everything that is.
        answer = await asyncio.to_thread(self._submit, messages, stop=stop, **kwargs)
        return await asyncio.wrap_future(answer)


def with_layout(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` with the JSON layout in its schema; anything that is not a JSON schema as it came."""
    if not response_format or response_format.get("type") != "json_schema":
        return response_format
    described = response_format["json_schema"]
    return {**response_format, "json_schema": {**described, "schema": {**described["schema"], **LAYOUT}}}


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as OpenAI's chat API takes them: every content a list of text and image_url parts.

    What reads like a control token gets a space into it ("< image>"): tokenizers know such tokens in any text, and a
    person's prompt or a model's answer must not open a picture or another speaker's turn.
    """
    converted: Any = convert_to_openai_messages(list(messages), text_format="block")
    for part in (part for message in converted for part in message["content"]):
        if part["type"] == "text":
            part["text"] = _CONTROL.sub(r"\g<0> ", part["text"])
    return converted


def image_url(image: Image.Image | bytes) -> str:
    """The image, or the bytes of a PNG, as a base64 data URL: lossless, and encoded at the fastest level."""
    if not isinstance(image, bytes):
        image = encoded(image.convert("RGB"), compress_level=1)
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_from_url(url: str) -> Image.Image:
    """The RGB image of a base64 data URL; anything else is a `ValueError`, since models here never fetch anything."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(f"images come as base64 data URLs (data:image/png;base64,…), not {url[:40]!r}")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"no image in the data URL: {error}") from error


def to_result(
    text: str, *, model: str, finish_reason: str, usage: dict[str, Any], logprobs: Any = None
) -> ChatResult:
    """An answer in LangChain's form; `usage` and `logprobs` (one entry per token) come in OpenAI's layout."""
    asked, answered = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    tokens: Any = {"input_tokens": asked, "output_tokens": answered, "total_tokens": asked + answered}
    if (cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens")) is not None:
        tokens["input_token_details"] = {"cache_read": cached}
    metadata: dict[str, Any] = {"model_name": model, "finish_reason": finish_reason}
    if logprobs is not None:
        metadata["logprobs"] = {"content": logprobs}
    message = AIMessage(content=text, usage_metadata=tokens, response_metadata=metadata)
    return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": model})
