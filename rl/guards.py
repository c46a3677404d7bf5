"""What training watches so that it does not win its reward by cheating.

Images of fixed held-out requests, looked at every so often by measures that gave no training reward: a
recogniser of another seed and split (`guard.model`) and plain pixel measures. The yardsticks are the base
under the neutral prompt and the teacher under the refined one: a guard has fallen when it lies clearly below
both. A rising reward with a fallen guard is the signature of reward hacking; training then stops or says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..domain import EmotionTarget, UserError
from ..tools.diffusion.conditioners import points
from ..tools.measures import colourfulness, diversity, edge_density
from ..tools.registry import resolve
from .config import GuardConfig
from .data.cache import Cache
from .data.examples import Example
from .policy import STUDENT, Policy

if TYPE_CHECKING:
    from PIL.Image import Image

#: Guards of which less is worse. The reward is what may not rise at their cost.
GUARDS = ("alignment", "diversity", "colourfulness", "edge_density")


class GuardModel(Protocol):
    """A recogniser: reads images, and says how much of a neutral prompt an image shows."""

    def read(self, images: list[Image]) -> Sequence[Any]:
        """Per image an object with `valence`, `arousal` and `features` (D,)."""
        ...

    def alignment(self, image: Image, prompt: str) -> float:
        """In [0, 1]."""
        ...


class Guards:
    """Looks at one policy again and again.

    Args:
        config: What to watch.
        policy: Whom.
        cache: Encodes the prompts.
        requests: Held-out examples; the first `config.prompts` different ones are used.

    Attributes:
        yardstick: Figures of base and teacher, by name; empty until `measure_yardstick`.
    """

    def __init__(
        self, config: GuardConfig, policy: Policy, cache: Cache, requests: Sequence[Example]
    ) -> None:
        self._config, self._policy, self._cache = config, policy, cache
        different = {(it.prompt, it.target): it for it in requests}
        self.requests = list(different.values())[: config.prompts]
        self._model: GuardModel | None = load_reader(config.model) if config.model else None
        self.yardstick: dict[str, dict[str, float]] = {}

    def measure_yardstick(self) -> None:
        """Look at the base under the neutral prompts and at the teacher under the refined ones."""
        neutral = [it.prompt for it in self.requests]
        refined = [it.refined or it.prompt for it in self.requests]
        self.yardstick = {
            "base": self._measure(self._images(neutral, "reference")),
            "teacher": self._measure(self._images(refined, "reference")),
        }

    def look(self) -> tuple[dict[str, float], list[list[Image]]]:
        """Figures of the student now, and its images: a list per request, an image per seed."""
        images = self._images([it.prompt for it in self.requests], STUDENT)
        return self._measure(images), images

    def fallen(self, figures: dict[str, float], before: dict[str, float]) -> list[str]:
        """Guards that lie below both yardsticks by more than the tolerance while the reward has risen.

        Args:
            figures: Of now.
            before: Of the first look.
        """
        if "reward" in figures and figures["reward"] <= before.get("reward", -np.inf):
            return []
        floors = {
            name: (1 - self._config.tolerance) * min(whose[name] for whose in self.yardstick.values())
            for name in GUARDS
            if name in figures and self.yardstick
        }
        return [name for name, floor in floors.items() if figures[name] < floor]

    def _images(self, prompts: list[str], voice: str) -> list[list[Image]]:
        seeds = list(range(self._config.seeds))
        out: list[list[Image]] = []
        for prompt, request in zip(prompts, self.requests, strict=True):
            told = self._cache.embeds([prompt]).to(self._policy.device).expand(len(seeds))
            target = points([request.target], self._policy.device).expand(len(seeds), 2)
            with torch.random.fork_rng(devices=[]):
                out.append(self._policy.sample(told, target, seeds, voice=voice, steps=self._config.steps))
        return out

    def _measure(self, images: list[list[Image]]) -> dict[str, float]:
        flat = [image for row in images for image in row]
        figures = {
            "colourfulness": float(np.mean([colourfulness(image) for image in flat])),
            "edge_density": float(np.mean([edge_density(image) for image in flat])),
        }
        if self._model is None:
            features = [np.stack([_thumbnail(image) for image in row]) for row in images]
            return figures | {"diversity": float(np.mean([diversity(row) for row in features]))}
        readings = self._model.read(flat)
        per_row = [
            readings[start : start + self._config.seeds] for start in range(0, len(flat), self._config.seeds)
        ]
        figures["diversity"] = float(np.mean([diversity([r.features for r in row]) for row in per_row]))
        aligned, rewards = [], []
        for request, row, pictures in zip(self.requests, per_row, images, strict=True):
            aligned += [self._model.alignment(picture, request.prompt) for picture in pictures]
            rewards += [_nearness(reading, request.target) for reading in row]
        return figures | {"alignment": float(np.mean(aligned)), "reward": float(np.mean(rewards))}


def _nearness(reading: Any, target: EmotionTarget) -> float:
    """The default reward without its alignment part: 1 - mean |Δ| / 3 over the wanted axes."""
    wanted = zip((reading.valence, reading.arousal), target.point, strict=True)
    errors = [abs(read - aim) for read, aim in wanted if aim is not None]
    return 1 - float(np.mean(errors)) / 3


def _thumbnail(image: Image) -> np.ndarray:
    """Mean-free 8 × 8 pixels: a poor man's features where no recogniser is at hand."""
    small = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float64).ravel()
    return small - small.mean()


def load_reader(path: str) -> GuardModel:
    """The recogniser at a dotted path.

    Raises:
        UserError: Nothing there, or nothing that reads images.
    """
    found = resolve(path, {}, "guard")
    guard = found() if isinstance(found, type) else found
    for method in ("read", "alignment"):
        if not callable(getattr(guard, method, None)):
            raise UserError(f"guard {path!r} has no method {method!r}")
    return guard
