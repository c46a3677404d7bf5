"""The critic: looks at one picture and says what it makes people feel, how well it shows the prompt, and what
would help. It judges against the *neutral* prompt, so that a rewrite that drops the dog is caught."""

from __future__ import annotations

import asyncio
import hashlib
import io
from dataclasses import dataclass, field, replace
from functools import lru_cache

from langchain_core.language_models import BaseChatModel
from PIL import Image

from ..domain import Critique, EmotionTarget, Missing
from ..settings import LVLMSettings
from ..tools import presets
from ..tools.lvlm.chat import image_url
from ..tools.reward import Look, Reward, Value
from .ask import Asker, Reply
from .prompt import chat, load_prompt
from .schemas import CRITIC_SCHEMA, CriticAnswer, average, cleaned, target_text


async def valued(
    reward: Reward, critique: Critique | Missing, target: EmotionTarget, prompt: str, png: bytes | None
) -> list[Value]:
    """The reward of a picture and of its parts, the one that counts last; `png` for a reward that sees."""
    if isinstance(critique, Missing):
        return [Value(reward.name, reward.version, None, f"no critique: {critique.reason}")]
    picture = await asyncio.to_thread(_decode, png) if reward.sees and png is not None else None
    values = await reward.values(Look(critique, target, prompt, picture))
    return [replace(it, reason=it.reason and cleaned(it.reason)[:300]) for it in values]


def _decode(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


@dataclass(frozen=True)
class Reading:
    """A critique and what it cost.

    Attributes:
        critique: What was read, or why there is nothing.
        usage: Tokens over all samples.
        seconds: Wall-clock time.
        error: The exception where the model itself failed.
    """

    critique: Critique | Missing
    usage: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    error: Exception | None = None


class Critic:
    """Reads pictures with a chat model.

    Args:
        model: Any LangChain chat model that takes images, or an `Asker` that shares one.
        prompt: Name or path of the prompt file.
        samples: Answers per picture; above 1 the model needs a temperature. Their mean counts, answers that
            cannot be used are left out, and only a picture without any is missing.
    """

    def __init__(self, model: BaseChatModel | Asker, prompt: str = "critic", samples: int = 1):
        self.asker = model if isinstance(model, Asker) else Asker(model)
        self.prompt = load_prompt(prompt)
        self.samples = samples
        # All pictures of a run are asked about in the same words.
        self._texts = lru_cache(256)(self._asked)

    def _asked(self, prompt: str, target: str) -> tuple[str, str, str]:
        return self.prompt.texts(prompt=prompt, target=target)

    @property
    def model(self) -> str:
        """The model's name, for the log."""
        return self.asker.name

    async def critique(
        self,
        image: Image.Image,
        prompt: str,
        target: EmotionTarget,
        *,
        seed: int = 0,
    ) -> Critique | Missing:
        """What a picture makes people feel.

        Args:
            image: The picture, RGB.
            prompt: The neutral prompt.
            target: The wanted emotion; the suggestion aims at it.
            seed: For a model that samples.

        Returns:
            The critique, or a `Missing` with the reason; never a made-up number.
        """
        return (await self.read(image, prompt, target, seed=seed)).critique

    async def read(
        self,
        image: Image.Image | bytes,
        prompt: str,
        target: EmotionTarget,
        *,
        seed: int = 0,
    ) -> Reading:
        """As `critique`, with what it cost; a picture that is a PNG already is not encoded again."""
        url = image_url(image) if isinstance(image, bytes) else await asyncio.to_thread(image_url, image)
        messages = chat(self._texts(prompt, target_text(target)), (url,))
        replies: list[Reply[CriticAnswer]] = await asyncio.gather(
            *(
                self.asker.ask(messages, CriticAnswer, "critique", CRITIC_SCHEMA, seed=_mix(seed, sample))
                for sample in range(self.samples)
            )
        )
        usage: dict[str, int] = {}
        for reply in replies:
            for key, value in reply.usage.items():
                usage[key] = usage.get(key, 0) + value
        answers = [reply.answer.critique() for reply in replies if isinstance(reply.answer, CriticAnswer)]
        seconds = max(reply.seconds for reply in replies)
        if answers:
            return Reading(average(answers), usage, seconds)
        first = replies[0]
        assert isinstance(first.answer, Missing)
        return Reading(first.answer, usage, seconds, first.error)


def _mix(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"critic:{seed}:{sample}".encode()).digest()[:4]) >> 1


def critic_of(model: BaseChatModel, settings: LVLMSettings, own: bool = True) -> Critic:
    """The critic that settings describe, on a loaded chat model; `own` for one that they loaded."""
    wanted = presets.defaults_if_known(settings.model, "lvlm") if own else {}
    # Our own clients know their time limits; anybody else's model is held to the setting.
    timeout, name = (None, settings.model) if own else (settings.timeout, None)
    # A model in this process fills its next batch while one runs.
    slots = max(settings.concurrency, 2 * getattr(model, "batch_size", 0))
    asker = Asker(model, slots, timeout, name, settings.rewriter_temperature)
    return Critic(asker, settings.critic_prompt or wanted.get("critic_prompt", "critic"), settings.samples)
