"""A chat model that answers personas, director and simple rewriter in prose around JSON, as general models do."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field
from scripted import critic_answer


class Cast(BaseChatModel):
    """See above.

    Attributes:
        wrong: Called with the role and the number of the question; what it returns is raised, or given as the answer.
        asked: Role and, of a persona, age, of each question.
    """

    model_name: str = "cast"
    wrong: Callable[[str, int], Exception | str | None] | None = None
    asked: list[tuple[str, str]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "cast"

    def close(self) -> None:
        """As our own engines have it."""

    def reply(self, system: str, said: str) -> str:
        """The answer to a system message and a question."""
        role = (
            "persona"
            if "You are this person" in system
            else "director"
            if "You direct" in system
            else "simple"
        )
        about = re.search(r"- (\d+) years old", system)
        self.asked.append((role, about[1] if about else ""))
        failure = self.wrong(role, len(self.asked)) if self.wrong else None
        if isinstance(failure, Exception):
            raise failure
        return failure or getattr(self, f"_{role}")(about, said)

    def _generate(self, messages: list[Any], *args: Any, **more: Any) -> ChatResult:
        text = self.reply(messages[0].content, "".join(part["text"] for part in messages[1].content))
        usage: Any = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text, usage_metadata=usage))])

    async def _agenerate(self, messages: list[Any], *args: Any, **more: Any) -> ChatResult:
        await asyncio.sleep(0)
        return self._generate(messages)

    def _persona(self, about: Any, said: str) -> str:
        neutral = re.findall(r"Neutral prompt: (.*)", said)[-1]
        chain = {"emotion": "unease at dusk", "appraisal": "somebody left", "concepts": ["a door", "a coat"]}
        turn = (
            int(hashlib.sha256(said.encode()).hexdigest(), 16) % 1000
        )  # another answer to another question alone
        prompt = f"{neutral}, lamp number {about[1]} turn {turn}, a sense of loss"
        return "Let me think. " + json.dumps({**chain, "light": "a low lamp", "prompt": prompt})

    def _director(self, about: Any, said: str) -> str:
        count = int(re.findall(r"Hand over (\d+)", said)[-1])
        drafts = re.findall(r"drafted: (.*)", said)
        prompts = [{"changes": "as drafted", "prompt": f"{draft} seen from afar"} for draft in drafts[:count]]
        return json.dumps({"why": "each in its own light", "prompts": prompts})

    def _simple(self, about: Any, said: str) -> str:
        return json.dumps({"why": "w", "prompts": [{"changes": "c", "prompt": "a dog by the sea in fog"}]})


class Looking(Cast):
    """Looks at pictures too, always with the same impression.

    Attributes:
        delay: Seconds that an answer takes.
    """

    delay: float = 0.0

    def _generate(self, messages: list[Any], *args: Any, **more: Any) -> ChatResult:
        if any(part["type"] == "image_url" for part in messages[1].content):
            usage: Any = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
            message = AIMessage(critic_answer(), usage_metadata=usage)
            return ChatResult(generations=[ChatGeneration(message=message)])
        return super()._generate(messages)

    async def _agenerate(self, messages: list[Any], *args: Any, **more: Any) -> ChatResult:
        await asyncio.sleep(self.delay)
        return self._generate(messages)
