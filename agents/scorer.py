"""The scorer: a critic that says only the two numbers, read from the probabilities of their tokens.

A fraction of a critique's time, and less accurate: for ranking many pictures, and as a second opinion
beside the critic's reward.
"""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.language_models import BaseChatModel
from PIL import Image

from ..domain import HIGH, LOW, EmotionTarget, Missing
from ..tools.lvlm.chat import image_url
from ..tools.lvlm.scores import Score, read_scores, score_only
from .ask import one_line
from .prompt import load_prompt
from .schemas import target_text


class Scorer:
    """Scores pictures with a chat model that reports log-probabilities.

    Args:
        model: `EmbeddedLVLM`, `VLLMChat`, or another that takes a JSON schema and `logprobs`.
        prompt: Name or path of the prompt file.
    """

    #: Of the reward, in a log.
    name, version = "score", "1"

    def __init__(self, model: BaseChatModel, prompt: str = "score"):
        self.prompt = load_prompt(prompt)
        self._model: Any = score_only(model)

    async def score(
        self, image: Image.Image, prompt: str, target: EmotionTarget
    ) -> dict[str, Score] | Missing:
        """Valence and arousal of a picture.

        Args:
            image: The picture, RGB.
            prompt: The neutral prompt.
            target: The wanted emotion.

        Returns:
            {"valence": …, "arousal": …}, or a `Missing` with the reason.
        """
        url = await asyncio.to_thread(image_url, image)
        messages = self.prompt.messages((url,), prompt=prompt, target=target_text(target))
        try:
            return read_scores(await self._model.ainvoke(messages))
        except Exception as error:
            return Missing(reason=one_line(error))

    @staticmethod
    def reward(scores: dict[str, Score], target: EmotionTarget) -> float:
        """`1 - mean over the wanted axes of |expectation - target| / 3`: the emotion reward without the
        rest."""
        wanted = zip(("valence", "arousal"), target.point, strict=True)
        errors = [
            abs(min(HIGH, max(LOW, scores[axis].expected)) - aim) for axis, aim in wanted if aim is not None
        ]
        return 1 - sum(errors) / len(errors) / 3
