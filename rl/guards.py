"""What training watches so that it does not win its reward by cheating.

Images of fixed held-out requests, looked at every so often by measures that gave no training reward: a
recogniser of another seed and split (`guard.model`) and plain pixel measures. The yardsticks are the base
under the neutral prompt and the teacher under the refined one: a guard has fallen when it lies clearly below
both. A rising reward with a fallen guard is the signature of reward hacking; training then stops or says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from ..domain import EmotionTarget, UserError
from ..tools.diffusion.conditioners import points
from ..tools.measures import colourfulness, diversity, edge_density
from ..tools.registry import resolve
from .config import GuardConfig
from .data.cache import Cache
from .data.examples import Example
from .policy import STUDENT, Policy

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
    """

    def __init__(
        self, config: GuardConfig, policy: Policy, cache: Cache, requests: Sequence[Example]
    ) -> None:
        self._config, self._policy, self._cache = config, policy, cache
        different = {(it.prompt, it.target): it for it in requests}
        self.requests = list(different.values())[: config.prompts]
        self._model: GuardModel | None = load_reader(config.model) if config.model else None

    def yardstick(self) -> dict[str, dict[str, float]]:
        """Figures of the base under the neutral prompts and of the teacher under the refined ones."""
        neutral = [it.prompt for it in self.requests]
        refined = [it.refined or it.prompt for it in self.requests]
        return {
            "base": self._measure(self._images(neutral, "reference")),
            "teacher": self._measure(self._images(refined, "reference")),
        }

    def look(self) -> tuple[dict[str, float], list[list[Image]]]:
        """Figures of the student now, and its images: a list per request, an image per seed."""
        images = self._images([it.prompt for it in self.requests], STUDENT)
        return self._measure(images), images

    def fallen(
        self, figures: dict[str, float], before: dict[str, float], yardstick: dict[str, dict[str, float]]
    ) -> list[str]:
        """Guards that lie below both yardsticks by more than the tolerance while the reward has risen.

        Args:
            figures: Of now.
            before: Of the first look.
            yardstick: Of base and teacher.
        """
        if "reward" in figures and figures["reward"] <= before.get("reward", -np.inf):
            return []
        share = 1 - self._config.tolerance
        return [
            name
            for name in GUARDS
            if name in figures and figures[name] < share * min(whose[name] for whose in yardstick.values())
        ]

    def _images(self, prompts: list[str], voice: str) -> list[list[Image]]:
        seeds = range(self._config.seeds)
        out: list[list[Image]] = []
        for prompt, request in zip(prompts, self.requests, strict=True):
            told = self._cache.embeds([prompt]).to(self._policy.device).expand(len(seeds))
            target = points([request.target], self._policy.device).expand(len(seeds), 2)
            out.append(self._policy.sample(told, target, seeds, voice=voice, steps=self._config.steps))
        return out

    def _measure(self, images: list[list[Image]]) -> dict[str, float]:
        flat = [image for row in images for image in row]
        figures: dict[str, list[float]] = {
            "colourfulness": [colourfulness(image) for image in flat],
            "edge_density": [edge_density(image) for image in flat],
        }
        if self._model is None:
            figures["diversity"] = [
                diversity(np.stack([_thumbnail(image) for image in row])) for row in images
            ]
        else:
            found = iter(self._model.read(flat))
            looked = [
                (request, row, list(islice(found, len(row))))
                for request, row in zip(self.requests, images, strict=True)
            ]
            figures |= {
                "diversity": [diversity([it.features for it in read]) for _, _, read in looked],
                "alignment": [
                    self._model.alignment(it, request.prompt) for request, row, _ in looked for it in row
                ],
                "reward": [_nearness(it, request.target) for request, _, read in looked for it in read],
            }
        return {name: float(np.mean(values)) for name, values in figures.items()}


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
