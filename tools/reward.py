"""Rewards: one number per picture, by name and version, so that a log says what it means.

A reward is anybody's function. What it is called with follows from its parameters, once, when it is loaded: a
reading and the target, or the picture and the prompt too, one at a time or many. Several with weights are one
reward, `"emotion + 0.5*pickscore"`; what a part does not know, the sum does not know either. A missing critique
never gets here: missing data is not a bad picture.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

from PIL.Image import Image

from ..domain import Critique, EmotionTarget, UserError, first_line
from . import registry

logger = logging.getLogger(__name__)

_ONE = ("picture", "prompt", "critique", "target")
_MANY = ("pictures", "prompts", "critiques", "targets")
#: Pictures that a reward of many gets at once.
_BATCH = 16
_TERM = re.compile(r"(?:([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*\*\s*)?(\S.*)")


def emotion_error(critique: Critique, target: EmotionTarget) -> float:
    """Mean over the wanted axes of |estimate - target|, in [0, 6]."""
    wanted = zip((critique.valence, critique.arousal), target.point, strict=True)
    errors = [abs(estimate - aim) for estimate, aim in wanted if aim is not None]
    return sum(errors) / len(errors)


@dataclass(frozen=True)
class EmotionReward:
    """The default: near to the target, of the right category, and still the picture that was asked for.

    `1 - error / 3 + 0.25 · [category wanted and right] - 0.5 · (1 - alignment)`, with `error` from
    `emotion_error`. 1 (1.25 with a category) is perfect; 0 is half the scale away, or a third with nothing
    of the neutral prompt left.
    """

    name: ClassVar = "emotion"
    version: ClassVar = "1"

    def __call__(self, critique: Critique, target: EmotionTarget) -> float:
        """The value of one critique against the target."""
        right = target.category is not None and critique.category == target.category
        return 1 - emotion_error(critique, target) / 3 + 0.25 * right - 0.5 * (1 - critique.alignment)


#: Rewards by name; the values are classes, functions, or dotted paths to either.
REWARDS: dict[str, Any] = {
    "emotion": EmotionReward,
    "clipscore": ".tools.scorers:ClipScore",
    "pickscore": ".tools.scorers:PickScore",
    "hpsv2": ".tools.scorers:HPSv2",
    "aesthetic": ".tools.scorers:Aesthetic",
}


@dataclass(frozen=True)
class Look:
    """What a reward values.

    Attributes:
        critique: What the critic read.
        target: The wanted emotion.
        prompt: The neutral prompt.
        picture: The picture, RGB; None where only a reading is at hand.
    """

    critique: Critique
    target: EmotionTarget
    prompt: str = ""
    picture: Image | None = None


@dataclass(frozen=True)
class Value:
    """A reward's word on a picture, as the log has it.

    Attributes:
        name: The reward's name.
        version: Its version.
        value: None is missing.
        reason: Why it is missing.
        weight: Of a part of a sum; None for the value that counts.
    """

    name: str
    version: str
    value: float | None
    reason: str | None = None
    weight: float | None = None


@dataclass(eq=False)
class Part:
    """One reward of a sum, called as it wants to be.

    Attributes:
        name: Its name in the log.
        version: Raised whenever a value may change.
        call: The function.
        weight: What its value is multiplied by.
        takes: The names of what it takes, of `_ONE` or `_MANY`; none for a function of critique and target.
    """

    name: str
    version: str
    call: Callable[..., Any]
    weight: float = 1.0
    takes: tuple[str, ...] = ()
    _waiting: dict[asyncio.Future[Any], Look] = field(default_factory=dict, init=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def now(self, look: Look) -> float | None:
        """The value, for code that cannot await; what the function raises is raised."""
        given = self._call([look])
        if inspect.isawaitable(given):
            given = asyncio.run(_wait(given))
        return _number(given[0] if self.takes == _MANY else given)

    async def value(self, look: Look) -> tuple[float | None, str | None]:
        """The value, or None and the reason: a function of a picture works in a thread, one call at a time."""
        try:
            if self.takes == _MANY:
                given = await self._in_company(look)
            else:
                async with self._turn:
                    given = await self._started([look])
            value = _number(await given if inspect.isawaitable(given) else given)
        except Exception as error:
            logger.warning("reward %s failed", self.name, exc_info=error)
            return None, f"reward {self.name}: {type(error).__name__}: {first_line(error)}"
        if value is None or not math.isfinite(value):
            return None, f"reward {self.name} gave {value}"
        return value, None

    def _call(self, looks: list[Look]) -> Any:
        if not self.takes:
            return self.call(looks[0].critique, looks[0].target)
        if self.takes == _ONE:
            return self.call(*(getattr(looks[0], name) for name in _ONE))
        return self.call(*([getattr(look, name) for look in looks] for name in _ONE))

    async def _started(self, looks: list[Look]) -> Any:
        if not self.takes:
            return self._call(looks)
        from .threads import apart  # loads torch

        return await asyncio.to_thread(apart, self._call, looks)

    async def _in_company(self, look: Look) -> Any:
        """The value out of a batch: what comes while one is computed shares the next."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting[mine] = look
        try:
            while not mine.done():
                async with self._turn:
                    await asyncio.sleep(0)  # who comes at the same moment comes along
                    await self._batch()
            return mine.result()
        finally:
            self._waiting.pop(mine, None)

    async def _batch(self) -> None:
        batch = dict(islice(self._waiting.items(), _BATCH))
        if not batch:
            return
        try:
            given = await self._started(list(batch.values()))
            found: list[Any] = list(await given if inspect.isawaitable(given) else given)
            if len(found) != len(batch):
                raise ValueError(f"{len(found)} values for {len(batch)} pictures")
        except Exception as error:
            found = [error] * len(batch)
        # Of a batch whose task was cancelled nothing gets here: the next in line begins it again.
        for future, value in zip(batch, found, strict=True):
            if self._waiting.pop(future, None) is None:
                continue
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)


async def _wait(given: Any) -> Any:
    return await given


def _number(given: Any) -> float | None:
    return None if given is None else float(given)


class Reward:
    """A loaded reward: one part, or the weighted sum of several; higher is better, the scale is its own.

    Attributes:
        parts: What it is made of.
        name: Its name in the log: of a sum what `load_reward` takes again, given that it knows the names.
        version: Raised whenever a value may change.
        sees: Whether it looks at the picture.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.name = " + ".join(
            part.name if part.weight == 1 else f"{part.weight}*{part.name}" for part in parts
        )
        self.version = " + ".join(part.version for part in parts)
        self.sees = any(part.takes for part in parts)

    async def values(self, look: Look) -> list[Value]:
        """The values of a picture: of each part of a sum, then the one that counts."""
        found = await asyncio.gather(*(part.value(look) for part in self.parts))
        parts = [
            Value(part.name, part.version, *said, weight=part.weight)
            for part, said in zip(self.parts, found, strict=True)
        ]
        reason = next((it.reason for it in parts if it.value is None), None)
        total = sum(it.value * it.weight for it in parts if it.value is not None and it.weight is not None)
        value = Value(self.name, self.version, None if reason else total, reason)
        return [value] if self.name == self.parts[0].name else [*parts, value]

    def now(self, look: Look) -> float:
        """The value for code that cannot await, such as a training job; NaN where it is missing.

        Raises:
            UserError: The reward looks at pictures, and a reading is all there is.
        """
        if self.sees and look.picture is None:
            raise UserError(
                f"reward {self.name} looks at the picture, and is asked for a reading without one: "
                "set data.told=wanted and data.phrases=0"
            )
        values = [(part.now(look), part.weight) for part in self.parts]
        return sum(math.nan if value is None else value * weight for value, weight in values)

    def __call__(self, critique: Critique, target: EmotionTarget) -> float:
        """The value of a reading alone; see `now`."""
        return self.now(Look(critique, target))


def terms(spec: str) -> dict[str, float]:
    """The parts of a reward as it is written, `"emotion + 0.5*pickscore"`, with their weights.

    Raises:
        UserError: A weight that is none, or a part that comes twice.
    """
    found: dict[str, float] = {}
    for term in spec.split(" + "):
        match = _TERM.fullmatch(term.strip())
        try:
            weight, name = float(match[1] or 1), match[2].strip()  # pyright: ignore[reportOptionalSubscript]
        except (TypeError, ValueError) as error:
            raise UserError(f'reward {spec!r}: write it as "emotion + 0.5*pickscore"') from error
        if name in found:
            raise UserError(f"reward {spec!r} names {name} twice")
        found[name] = weight
    return found


def load_reward(spec: str | Callable[..., Any] | type[Any] = "emotion") -> Reward:
    """Find a reward.

    Args:
        spec: A name in `REWARDS`, with a model of one's own behind a colon (`"pickscore:FOLDER"`); a dotted path
            (`"my_pkg.my_mod:MyReward"`); a class without required arguments; a function of
            `(critique, target)`, `(picture, prompt, critique, target)` or, for many at once,
            `(pictures, prompts, critiques, targets)`, plain or async; or several of the names with weights,
            `"emotion + 0.5*pickscore"`. A function's `name` and `version` attributes go into the log; without
            them its own name and "0" do.

    Raises:
        UserError: Nothing of that name, it cannot be called, or it takes something else.
    """
    wanted = terms(spec).items() if isinstance(spec, str) else [(spec, 1.0)]
    return Reward([_part(name, weight) for name, weight in wanted])


def _part(spec: Any, weight: float) -> Part:
    head, _, model = spec.partition(":") if isinstance(spec, str) else (spec, "", "")
    known = isinstance(head, str) and head in REWARDS
    found: Any = registry.resolve(head if known else spec, REWARDS, "reward")
    if isinstance(found, type):
        try:
            found = found(*([model] if known and model else []))
        except TypeError as error:
            raise UserError(f"reward {spec!r}: cannot be made without arguments ({error})") from error
    if not callable(found):
        raise UserError(f"reward {spec!r} is not callable: give a function (critique, target) -> float")
    name = str(getattr(found, "name", None) or getattr(found, "__qualname__", type(found).__qualname__))
    return Part(name, str(getattr(found, "version", "0")), found, weight, _takes(found, name))


def _takes(call: Callable[..., Any], name: str) -> tuple[str, ...]:
    """What a reward takes, by the names of its parameters; of two, any names will do.

    Raises:
        UserError: Something else.
    """
    try:
        signature = inspect.signature(call)
        names = tuple(signature.parameters)[:4]
        takes = names if names in (_ONE, _MANY) else ()
        signature.bind(*(takes or (None, None)))
    except (TypeError, ValueError) as error:
        forms = ", ".join(f"({', '.join(form)})" for form in (("critique", "target"), _ONE, _MANY))
        raise UserError(f"reward {name} takes none of {forms}: {error}") from error
    return takes
