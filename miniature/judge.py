"""The law judge and the guard: readers of pictures without any language model.

Both compute the colour part of the law from pixels and let a small convolutional recogniser name the rest:
subject, place, weather, brightness and what stands in each corner. The law then turns that scene into numbers.
They differ from the critic in architecture, and from each other in seed and in the compositions that they
were trained on (`world.FOLDS`). The judge judges and is never a reward; the guard watches training and is
never a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import law, world
from .episodes import alignment
from .vocabulary import COMPANIONS, FACTORS, LIGHT, SUBJECTS, Side
from .world import Placed, Scene

WEIGHTS = Path(__file__).parent / "weights"

#: Corners in the order of the network's outputs: (sky, side).
CORNERS: tuple[tuple[bool, Side], ...] = ((True, "left"), (True, "right"), (False, "left"), (False, "right"))
#: Things that may stand in the sky (True) or on the ground.
_THINGS = {sky: [name for name, thing in COMPANIONS.items() if thing.sky is sky] for sky in (True, False)}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.one(x)))
        return F.relu(self.norm2(self.two(h)) + self.skip(x))


class Recogniser(nn.Module):
    """A small residual network, 96 × 96 pixels → an 8 × 8 map.

    The subject is read from the middle 4 × 4 of the map, each corner from its own 3 × 3, the rest from the mean.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 6, 3, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(
            _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2), _Block(4 * width, 4 * width, 1)
        )
        c = 4 * width
        self.features = c * 16
        self.subject = nn.Linear(c * 16, len(SUBJECTS))
        # Each corner: nothing, or one of its things near, or far.
        self.sky = nn.Linear(c * 9, 1 + 2 * len(_THINGS[True]))
        self.ground = nn.Linear(c * 12, 1 + 2 * len(_THINGS[False]))
        self.whole = nn.ModuleList(nn.Linear(2 * c, len(table)) for table in FACTORS.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pixels (batch, 3, 96, 96) in [-1, 1] → logits by name, and `features` (batch, D)."""
        h = self.body(self.stem(x))
        middle = h[:, :, 2:6, 2:6].flatten(1)
        overall = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return {
            "subject": self.subject(middle),
            "corner0": self.sky(h[:, :, :3, :3].flatten(1)),
            "corner1": self.sky(h[:, :, :3, 5:].flatten(1)),
            "corner2": self.ground(h[:, :, 4:, :3].flatten(1)),
            "corner3": self.ground(h[:, :, 4:, 5:].flatten(1)),
            **{f"whole{i}": head(overall) for i, head in enumerate(self.whole)},
            "features": torch.cat([middle.view(len(x), -1, 16).mean(2), overall], 1),
        }


def labels(scene: Scene) -> dict[str, int]:
    """The recogniser's right answers for a scene."""
    answer = {"subject": list(SUBJECTS).index(scene.subject)}
    answer |= {f"corner{i}": 0 for i in range(4)}
    for placed in scene.companions:
        sky = COMPANIONS[placed.name].sky
        index = 1 + 2 * _THINGS[sky].index(placed.name) + placed.far
        answer[f"corner{CORNERS.index((sky, placed.side))}"] = index
    answer |= {f"whole{i}": index for i, index in enumerate(world.factor_indices(scene))}
    return answer


@dataclass(frozen=True)
class Reading:
    """What a reader saw in one picture.

    Attributes:
        valence: In [-3, 3].
        arousal: In [-3, 3].
        subject: Name of the subject.
        companions: Names of the companions.
        place: Name of the place.
        category: Mikels category by the law.
        scene: Everything that was recognised.
        features: Shape (D,), float32: the recogniser's inner description, for distances.
    """

    valence: float
    arousal: float
    subject: str
    companions: list[str]
    place: str
    category: str
    scene: Scene
    features: NDArray[np.float32]


class Reader:
    """Reads pictures with a trained recogniser and the law.

    Args:
        folder: Folder with `model.safetensors`.
    """

    #: Of what turns a recognised scene into numbers; a reading that is kept names it beside the weights.
    version = f"law {law.VERSION}, world {world.VERSION}"

    def __init__(self, folder: Path) -> None:
        tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        self.model = Recogniser(tensors["stem.1.weight"].shape[0])
        # The counters of batch norm are not saved: they only matter in training.
        self.model.load_state_dict(tensors, strict=False)
        self.model.eval()

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image], batch: int = 64) -> list[Reading]:
        """Read pictures.

        Args:
            images: RGB pictures; others than 96 × 96 are resized.
            batch: Pictures in one pass.
        """
        found: list[Reading] = []
        size = (world.SIZE, world.SIZE)
        for start in range(0, len(images), batch):
            part = [i.convert("RGB") for i in images[start : start + batch]]
            pixels = np.stack([np.asarray(i if i.size == size else i.resize(size)) for i in part])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            out = self.model(x)
            features = out.pop("features").float().numpy()
            best = {name: value.argmax(1).tolist() for name, value in out.items()}
            found += [
                self._reading(pixels[i], {name: indices[i] for name, indices in best.items()}, features[i])
                for i in range(len(part))
            ]
        return found

    @staticmethod
    def _reading(pixels: NDArray[np.uint8], best: dict[str, int], features: NDArray[np.float32]) -> Reading:
        companions = []
        for i, (sky, side) in enumerate(CORNERS):
            index = best[f"corner{i}"]
            if index:
                companions.append(Placed(_THINGS[sky][(index - 1) // 2], side, bool((index - 1) % 2)))
        factors = {
            factor: list(values)[best[f"whole{i}"]] for i, (factor, values) in enumerate(FACTORS.items())
        }
        scene = Scene(list(SUBJECTS)[best["subject"]], **factors, companions=tuple(companions))
        valence, arousal = law.affect(scene, pixels)
        return Reading(
            valence=valence, arousal=arousal, subject=scene.subject, companions=[c.name for c in companions],
            place=scene.place, category=law.category(valence, arousal, companions), scene=scene, features=features,
        )  # fmt: skip

    def alignment(self, image: Image.Image, neutral_prompt: str) -> float:
        """How much of what the neutral prompt names the picture shows, 0 to 1 (`episodes.alignment`)."""
        return self.alignments([image], neutral_prompt)[0]

    def alignments(self, images: Sequence[Image.Image], neutral_prompt: str) -> list[float]:
        """The same for several pictures of one prompt."""
        named = world.parse(neutral_prompt)
        return [alignment(named, reading.scene) for reading in self.read(images)]

    @staticmethod
    def content(reading: Reading, neutral_prompt: str) -> tuple[bool | None, int]:
        """What became of the rest of a neutral prompt.

        Returns:
            Whether every companion and every attribute (weather, light) that it names is in the picture, None where
            it names none; and how many companions and weathers the picture has that it does not name.
        """
        named, shown = world.parse(neutral_prompt), set(reading.companions)
        asked = {thing.name for thing in named.companions}
        hits = [name in shown for name in asked]
        hits += [
            value == getattr(reading.scene, factor)
            for factor in ("weather", *LIGHT)
            if (value := getattr(named, factor))
        ]
        weather = named.weather is None and reading.scene.weather != "clear"
        return all(hits) if hits else None, len(shown - asked) + weather

    @staticmethod
    def subject_of(prompt: str) -> str | None:
        """The subject that a prompt names, or None."""
        return world.parse(prompt).subject


class LawJudge(Reader):
    """The miniature's judge."""

    def __init__(self, folder: Path = WEIGHTS / "judge") -> None:
        super().__init__(folder)


class Guard(Reader):
    """The miniature's guard."""

    def __init__(self, folder: Path = WEIGHTS / "guard") -> None:
        super().__init__(folder)


class Content:
    """A reward: how much of the neutral prompt a picture shows, by the guard; it knows nothing of emotions."""

    name, version = "content", "1"

    def __init__(self) -> None:
        self._guard = Guard()

    def __call__(self, picture: Image.Image, prompt: str, critique: object, target: object) -> float:
        """In [0, 1]."""
        return self._guard.alignment(picture, prompt)


@cache
def _guards_model() -> Recogniser:
    return Guard().model.requires_grad_(False)


def named(pictures: Tensor, prompts: Sequence[str], targets: Tensor) -> Tensor:
    """A reward with a gradient, for `objective.reward` of `direct`: what a neutral prompt names shall stay.

    Args:
        pictures: (B, 3, 96, 96) in [0, 1].
        prompts: B neutral prompts.
        targets: Not looked at.

    Returns:
        (B,), 0 at most: the log-probability, by the guard, of each thing, surrounding and light that the prompt
        names, in the mean; 0 where it names nothing.
    """
    seen = _guards_model()(pictures.float() * 2 - 1)
    said = {name: logits.log_softmax(1) for name, logits in seen.items() if name != "features"}
    rewards: list[Tensor] = []
    for row, prompt in enumerate(prompts):
        wanted = world.parse(prompt)
        found = [said["subject"][row, list(SUBJECTS).index(wanted.subject)]] if wanted.subject else []
        for name in (thing.name for thing in wanted.companions):
            # It may stand in either corner of its height, near or far.
            corners = [said[f"corner{i}"][row] for i, (sky, _) in enumerate(CORNERS) if name in _THINGS[sky]]
            near = 1 + 2 * _THINGS[COMPANIONS[name].sky].index(name)
            found.append(torch.cat([it[near : near + 2] for it in corners]).logsumexp(0).clamp_max(0))
        for place, (factor, values) in enumerate(FACTORS.items()):
            if value := getattr(wanted, factor):
                found.append(said[f"whole{place}"][row, list(values).index(value)])
        rewards.append(torch.stack(found).mean() if found else pictures.new_zeros(()))
    return torch.stack(rewards)
