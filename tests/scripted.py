"""A chat model that really looks at the picture, by rule: the same picture and words give the same answer.

It answers critics and rewriters of either prompt style. What goes wrong is scripted: `fail` maps a call's
number to an exception, or to the text to give instead of an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from emoloop.agents.rewriters import Rewrite, RewriteRequest
from emoloop.tools.lvlm.chat import image_from_url
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import ConfigDict, Field, PrivateAttr


def critic_answer(valence: float = 0.5, arousal: float = 0.5, **changes: Any) -> str:
    answer = {
        "analysis": "a picture",
        "valence": f"{valence:+.1f}",
        "arousal": f"{arousal:+.1f}",
        "category": "awe",
        "alignment": "0.8",
        "suggestion": "more light",
    }
    return json.dumps({**answer, **changes})


class Scripted(BaseChatModel):
    """See above.

    Attributes:
        fail: Called with the role ("critic" or "rewriter") and the number of its call, from 0; what it returns is
            raised, or given as the answer.
        delay: Seconds that an answer takes.
        calls: How often each role was asked.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    fail: Callable[[str, int], Exception | str | None] = lambda role, number: None
    delay: float = 0.0
    calls: dict[str, int] = Field(default_factory=dict)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    seen: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def close(self) -> None:
        """As our own engines have it."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        system = messages[0]
        assert isinstance(system, SystemMessage)
        role = "critic" if any(_images(message) for message in messages) else "rewriter"
        with self._lock:
            number = self.calls.get(role, 0)
            self.calls[role] = number + 1
            self.seen.append(messages)
        wrong = self.fail(role, number)
        if isinstance(wrong, Exception):
            raise wrong
        text = wrong or (self._critique(messages) if role == "critic" else self._rewrite(messages))
        usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        message = AIMessage(text, usage_metadata=usage)  # pyright: ignore[reportArgumentType]
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        await asyncio.sleep(self.delay)
        return self._generate(messages)

    def _critique(self, messages: list[BaseMessage]) -> str:
        url = next(url for message in messages for url in _images(message))
        pixels = np.asarray(image_from_url(url), dtype=np.float64)
        valence = (pixels.mean() / 255 - 0.5) * 4 + (pixels[..., 0].mean() - pixels[..., 2].mean()) / 40
        arousal = (pixels.std() / 64 - 1) * 2
        return critic_answer(float(np.clip(valence, -3, 3)), float(np.clip(arousal, -3, 3)))

    def _rewrite(self, messages: list[BaseMessage]) -> str:
        said = "".join(part["text"] for part in messages[-1].content if isinstance(part, dict))
        words = ("bright", "dark", "red", "calm", "house", "boat")
        digest = hashlib.sha256(said.encode()).digest()
        added = words[digest[0] % 6], words[digest[1] % 6]
        return json.dumps(
            {"why": "because", "changes": "light", "prompt": f"a dog by the sea {' '.join(added)}"}
        )


def _images(message: BaseMessage) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [
        part["image_url"]["url"]
        for part in message.content
        if isinstance(part, dict) and part.get("type") == "image_url"
    ]


class Own:
    """Somebody's rewriter, that gives one prompt at a time."""

    name = model = "own"
    prompt_id = "own@1"

    def __init__(self, asker: object, prompt: str) -> None:
        pass

    def says(self, neutral: str, seed: int) -> str:
        return f"{neutral} {seed % 10_000}"

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        return Rewrite(self.says(request.neutral, request.seed), changes=str(len(request.rounds)))
