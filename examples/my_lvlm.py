"""An LVLM of your own: any LangChain chat model that answers with the JSON object that it is asked for.

This one is a rule, so that it can be read: it takes valence from light and arousal from contrast, and asks for
more light. A hosted model is one line: `open_loop(lvlm=ChatOpenAI(model=…, base_url=…))`.
"""

import base64
import io
import json
from typing import Any

import numpy as np
from emoloop import EmotionTarget, open_loop
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image


class Photometer(BaseChatModel):
    """Critic when a picture comes with the question, rewriter when none does."""

    @property
    def _llm_type(self) -> str:
        return "photometer"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> ChatResult:
        pictures = [it for it in map(_picture, messages) if it is not None]
        answer = _critique(pictures[-1]) if pictures else _rewrite(messages)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(json.dumps(answer)))])


def _picture(message: BaseMessage) -> np.ndarray | None:
    for block in message.content:
        if isinstance(block, dict) and block["type"] == "image_url":
            data = block["image_url"]["url"].partition(",")[2]
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) / 255
    return None


def _critique(light: np.ndarray) -> dict[str, str]:
    return {
        "analysis": f"mean light {light.mean():.2f}, contrast {light.std():.2f}",
        "valence": f"{6 * light.mean() - 3:+.1f}",
        "arousal": f"{min(3, 12 * light.std() - 3):+.1f}",
        "category": "contentment",
        "alignment": "1.0",
        "suggestion": "more light",
    }


def _rewrite(messages: list[BaseMessage]) -> dict[str, str]:
    return {"why": "it was dark", "changes": "more light", "prompt": "a dog by the sea in bright light"}


if __name__ == "__main__":
    with open_loop(lvlm=Photometer(), loop={"rounds": 2, "images": 2}) as loop:
        result = loop.run_sync("a dog by the sea", EmotionTarget(valence=3), seed=1)
    assert result.best is not None and result.best.critique is not None, result.warnings
    print(result.best.critique.model_dump_json(include={"analysis", "valence", "arousal"}))
