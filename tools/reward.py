"""Rewards: one number per critique and target, by name and version, so that a log says what it means.

A missing critique never gets here: missing data is not a bad picture. A newcomer's reward is a function
`(critique, target) -> float`, plain or async: a dotted path in `loop.reward`, or given to `open_loop(reward=…)`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from ..domain import Critique, EmotionTarget, UserError
from . import registry


@runtime_checkable
class Reward(Protocol):
    """A reward; higher is better, the scale is its own."""

    @property
    def name(self) -> str:
        """Its name in the log."""
        ...

    @property
    def version(self) -> str:
        """Raised whenever a value may change."""
        ...

    def __call__(self, critique: Critique, target: EmotionTarget) -> Any:
        """The value of one critique against the target: a float, or an awaitable of one."""
        ...


def value_now(reward: Reward, critique: Critique, target: EmotionTarget) -> float:
    """A reward's value for code that cannot await, such as a training job."""

    async def wait(given: Any) -> float:
        return float(await given)

    given = reward(critique, target)
    return asyncio.run(wait(given)) if inspect.isawaitable(given) else float(given)


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

    name: str = "emotion"
    version: str = "1"

    def __call__(self, critique: Critique, target: EmotionTarget) -> float:
        """The value of one critique against the target."""
        right = target.category is not None and critique.category == target.category
        return 1 - emotion_error(critique, target) / 3 + 0.25 * right - 0.5 * (1 - critique.alignment)


#: Rewards by name; the values are classes, functions, or dotted paths to either.
REWARDS: dict[str, Any] = {"emotion": EmotionReward}


def load_reward(spec: str | Callable[..., Any] = "emotion") -> Reward:
    """Find a reward.

    Args:
        spec: A name in `REWARDS`, a dotted path (`"my_pkg.my_mod:MyReward"`), a class without required
            arguments, or a callable `(critique, target) -> float`. A callable's `name` and `version`
            attributes go into the log; without them its own name and "0" do.

    Raises:
        UserError: Nothing of that name, or it cannot be called.
    """
    found: Any = registry.resolve(spec, REWARDS, "reward")
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise UserError(f"reward {spec!r}: cannot be made without arguments ({error})") from error
    if not callable(found):
        raise UserError(f"reward {spec!r} is not callable: give a function (critique, target) -> float")
    if isinstance(found, Reward):
        return found
    named: Any = partial(found)
    named.name = str(getattr(found, "name", None) or getattr(found, "__qualname__", type(found).__qualname__))
    named.version = str(getattr(found, "version", "0"))
    return named
