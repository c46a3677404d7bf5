"""What our chat models share: messages in OpenAI's form, the JSON layout, and an answer in LangChain's form.

The LVLM learns one layout of its JSON (`", "` and `": "`), and reads and writes it most surely in that
layout. A JSON schema says nothing about spaces, so the layout travels as the grammar engine's own key
inside the schema.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image

#: llguidance's options, read from the schema itself by every engine that uses it (ours, and vLLM's
#: "guidance").
LAYOUT = {"x-guidance": {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}}


def with_layout(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` with the JSON layout in its schema; anything that is not a JSON schema as it came."""
    if not response_format or response_format.get("type") != "json_schema":
        return response_format
    described = response_format["json_schema"]
    return {**response_format, "json_schema": {**described, "schema": {**described["schema"], **LAYOUT}}}


def continues(messages: Sequence[BaseMessage]) -> bool:
    """Whether the chat ends with words of the model's own, which it is then to go on from."""
    return isinstance(messages[-1], AIMessage)


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as OpenAI's chat API takes them: every content a list of text and image_url parts."""
    return convert_to_openai_messages(list(messages), text_format="block")


def image_url(image: Image.Image | bytes) -> str:
    """The image, or the bytes of a PNG, as a base64 data URL: lossless, and encoded at the fastest level."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_from_url(url: str) -> Image.Image:
    """The RGB image of a base64 data URL.

    Raises:
        ValueError: Another kind of URL, or no image in it. Models in this process never fetch anything.
    """
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(f"images come as base64 data URLs (data:image/png;base64,…), not {url[:40]!r}")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"no image in the data URL: {error}") from error


def to_result(
    text: str,
    *,
    model: str,
    finish_reason: str,
    prompt_tokens: int,
    answer_tokens: int,
    cached_tokens: int | None = None,
    logprobs: list[dict[str, Any]] | None = None,
) -> ChatResult:
    """An answer as `ChatOpenAI` would return it.

    Args:
        text: The answer.
        model: Name of the model.
        finish_reason: "stop" or "length".
        prompt_tokens: Tokens of the prompt, image tokens included.
        answer_tokens: Tokens of the answer.
        cached_tokens: Prompt tokens that came out of the prefix cache, where known.
        logprobs: One entry per token: token, bytes, logprob, top_logprobs (OpenAI's layout).
    """
    usage: dict[str, Any] = {
        "input_tokens": prompt_tokens,
        "output_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }
    if cached_tokens is not None:
        usage["input_token_details"] = {"cache_read": cached_tokens}
    metadata: dict[str, Any] = {"model_name": model, "finish_reason": finish_reason}
    if logprobs is not None:
        metadata["logprobs"] = {"content": logprobs}
    message = AIMessage(content=text, usage_metadata=usage, response_metadata=metadata)  # pyright: ignore[reportArgumentType]
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info={"finish_reason": finish_reason})],
        llm_output={"model_name": model},
    )
