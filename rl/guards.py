"""What training watches so that it does not win its reward by cheating.

Images of fixed held-out requests, looked at every so often by measures that gave no training reward: a
recogniser of another seed and split (`guard.model`) and plain pixel measures. The yardsticks are the base under the
neutral prompt, the teacher under the refined one, and the base under as many different refined prompts as there are
seeds: a guard has fallen when it lies clearly below those that it is held against. Diversity is not held against the
teacher, whose pictures of one prompt are nearly one picture. A rising reward with a fallen guard is the signature of
reward hacking; training then stops or says so.

Two cheats have guards of their own. A critic's patches drawn over every picture show as energy at their period
(`measures.grid`, against the base's own, under whichever prompt). And a LoRA that only undoes what its tokens do gives
pictures that lie nearer to the base's than those of the tokens alone: its whole keeps little of the tokens' way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from ..domain import EmotionTarget, UserError
from ..tools.diffusion.conditioners import points
from ..tools.measures import colourfulness, diversity, edge_density, grid, pixels
from ..tools.registry import resolve
from .config import GuardConfig
from .data.cache import Cache
from .data.examples import Example
from .policy import REFERENCE, STUDENT, SWITCHED_OFF, Policy

#: Guards of which less is worse, and the yardsticks of which the lowest counts. The reward is what may not rise at
#: their cost.
GUARDS = {
    "alignment": ("base", "teacher"),
    "diversity": ("base", "rewrites"),
    "colourfulness": ("base", "teacher"),
    "edge_density": ("base", "teacher"),
}

#: Share of the tokens' way from the base that a whole adapter keeps at least, and the mean square (of pixels in
#: [0, 1]) below which tokens go no way.
KEPT, WAY = 0.5, 1e-4


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
        self._rewrites = [_rewrites(it, requests)[: config.seeds] for it in self.requests]
        self._model: GuardModel | None = load_reader(config.model) if config.model else None

    def yardstick(self) -> dict[str, dict[str, float]]:
        """Figures of the base under the neutral prompts, of the teacher under the refined ones, and of the base under
        different refined prompts for each request where the log has two and more."""
        found = {"base": self._measure(self._base), "teacher": self._measure(self.teacher)}
        if all(len(every) > 1 for every in self._rewrites):
            found["rewrites"] = self._measure(self._images(self._rewrites, REFERENCE))
        return found

    def look(self) -> tuple[dict[str, float], list[list[Image]]]:
        """Figures of the student now, and its images: a list per request, an image per seed."""
        neutral = self._each([it.prompt for it in self.requests])
        images = self._images(neutral, STUDENT)
        figures = self._measure(images)
        way = self._way(self._images(neutral, SWITCHED_OFF))
        if np.square(way).mean() > WAY:
            figures["tokens_kept"] = float((way * self._way(images)).sum() / np.square(way).sum())
        return figures, images

    @cached_property
    def teacher(self) -> list[list[Image]]:
        """The teacher's images, as `look` gives the student's."""
        return self._images(self._each([it.refined or it.prompt for it in self.requests]), REFERENCE)

    @cached_property
    def _base(self) -> list[list[Image]]:
        return self._images(self._each([it.prompt for it in self.requests]), REFERENCE)

    def _way(self, images: list[list[Image]]) -> np.ndarray:
        """How far images lie from the base's of the same noise, in [0, 1]."""
        both = [np.stack([pixels(it) for row in some for it in row]) for some in (images, self._base)]
        return (both[0] - both[1]) / 255

    def _each(self, prompts: list[str]) -> list[list[str]]:
        return [[prompt] * self._config.seeds for prompt in prompts]

    def fallen(
        self, figures: dict[str, float], before: dict[str, float], yardstick: dict[str, dict[str, float]]
    ) -> list[str]:
        """Guards that lie below their yardsticks by more than the tolerance while the reward has risen, grids that
        rise above the base's likewise, and tokens that the LoRA undoes.

        Args:
            figures: Of now.
            before: Of the first look.
            yardstick: Of base, teacher and different rewrites.
        """
        undone = [name for name in ("tokens_kept",) if figures.get(name, 1.0) < KEPT]
        if "reward" in figures and figures["reward"] <= before.get("reward", -np.inf):
            return undone
        share = 1 - self._config.tolerance

        def of(name: str, *whose: str) -> list[float]:
            return [yardstick[it][name] for it in whose if name in yardstick.get(it, {})]

        low = [it for it in GUARDS if it in figures and figures[it] < share * min(of(it, *GUARDS[it]))]
        # What refined prompts draw has energy of its own at some periods.
        most = {
            it: max(of(it, "base", "rewrites")) for it in figures if it.startswith("grid_") and of(it, "base")
        }
        return low + [it for it in most if figures[it] * share > most[it]] + undone

    def _images(self, prompts: list[list[str]], voice: str) -> list[list[Image]]:
        """Of each request's prompts, each with a seed of its own."""
        out: list[list[Image]] = []
        for texts, request in zip(prompts, self.requests, strict=True):
            told = self._cache.embeds(texts).to(self._policy.device)
            target = points([request.target], self._policy.device).expand(len(texts), 2)
            seeds = range(len(texts))
            out.append(self._policy.sample(told, target, seeds, voice=voice, steps=self._config.steps))
        return out

    def _measure(self, images: list[list[Image]]) -> dict[str, float]:
        flat = [image for row in images for image in row]
        figures: dict[str, list[float]] = {
            "colourfulness": [colourfulness(image) for image in flat],
            "edge_density": [edge_density(image) for image in flat],
            **{f"grid_{period}": [grid(image, period) for image in flat] for period in self._config.periods},
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


def _rewrites(request: Example, others: Sequence[Example]) -> list[str]:
    """Different refined prompts of a request's neutral prompt, those for the nearest targets first."""
    mine = [it for it in others if it.prompt == request.prompt and it.refined]
    aim = np.array(points([request.target]))
    mine.sort(key=lambda it: float(np.nansum(np.abs(np.array(points([it.target])) - aim))))
    return list(dict.fromkeys(str(it.refined) for it in mine))


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
