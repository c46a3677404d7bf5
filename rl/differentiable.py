"""Rewards with a gradient to the picture: critics read by score mode, or anybody's function.

A reward is a callable `(pictures, prompts, targets) -> rewards`: pictures (B, 3, H, W) in [0, 1] with gradient, B
neutral prompts, targets (B, 2) with NaN where an axis is not wanted, rewards (B,). Score mode reads worse than a full
critique and alone has a gradient; as a control variate it says in which direction the picture has to change, and the
full critique how far it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, smooth_l1_loss

from ..agents.prompt import load_prompt
from ..agents.schemas import CRITIC_SCHEMA, CriticAnswer, response_format, target_text
from ..domain import EmotionTarget
from ..tools import presets
from ..tools.lvlm.chat import image_url
from ..tools.lvlm.embedded import EmbeddedLVLM
from ..tools.lvlm.gradient import GradientReader
from ..tools.registry import resolve

Reward = Callable[[Tensor, Sequence[str], Tensor], Tensor]

#: Points within which a miss weighs by its square: the gradient's direction is noise where nothing is missed.
NEAR = 0.5


class CriticReward:
    """How near a critic reads pictures to what was wanted: minus |ΔV| + |ΔA| in points (Huber's, over wanted axes).

    Args:
        model: A preset's name, a folder or a hub id of an image-text-to-text model.
        prompt: Prompt file of score mode.
        critique: Prompt file of the full critique that gives the value, or None: the score gives it.
        size: (height, width) that pictures are brought to; None leaves them.
        device: Where the model runs.
    """

    def __init__(
        self, model: str, prompt: str, critique: str | None, size: tuple[int, int] | None, device: str
    ) -> None:
        folder = presets.resolve(model, "lvlm")
        wanted = presets.defaults(folder, "lvlm")
        known = {key: wanted[key] for key in ("max_tokens", "batch_size", "threads") if key in wanted}
        self._chat = EmbeddedLVLM(model=str(folder), device=device, **known)
        self._reader = GradientReader(self._chat)
        self._prompt, self._critique = load_prompt(prompt), load_prompt(critique) if critique else None
        self._size = size

    def __call__(self, pictures: Tensor, prompts: Sequence[str], targets: Tensor) -> Tensor:
        """See the module's text."""
        read = self.read(pictures, prompts, targets)
        missed = smooth_l1_loss(read, targets.nan_to_num().to(read), reduction="none", beta=NEAR)
        return -torch.where(targets.isnan().to(read.device), 0.0, missed).sum(1)

    def read(self, pictures: Tensor, prompts: Sequence[str], targets: Tensor) -> Tensor:
        """(B, 2) valence and arousal: value and gradient as configured."""
        if self._size is not None:
            pictures = interpolate(pictures, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        told = [
            {"prompt": prompt, "target": target_text(_target(target))}
            for prompt, target in zip(prompts, targets.tolist(), strict=True)
        ]
        score = self._reader(pictures, [self._prompt.messages(("data:,",), **values) for values in told])
        if not self._critique:
            return score
        full = self._full(pictures, told).to(score)
        # A critique that could not be read leaves the score as it is.
        return score + torch.where(full.isnan(), 0.0, full - score).detach()

    def _full(self, pictures: Tensor, told: Sequence[dict[str, str]]) -> Tensor:
        assert self._critique
        pixels = (pictures.detach().permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()
        asked: list[Any] = [
            self._critique.messages((image_url(Image.fromarray(picture)),), **values)
            for picture, values in zip(pixels, told, strict=True)
        ]
        answers = self._chat.bind(response_format=response_format("critique", CRITIC_SCHEMA)).batch(asked)
        return torch.tensor([_numbers(it.text) for it in answers])


def _numbers(answer: str) -> tuple[float, float]:
    try:
        said = CriticAnswer.model_validate_json(answer).critique()
    except ValueError:
        return torch.nan, torch.nan
    return said.valence, said.arousal


def _target(point: Sequence[float]) -> EmotionTarget:
    axes = zip(("valence", "arousal"), point, strict=True)
    return EmotionTarget.model_validate({axis: round(value, 1) for axis, value in axes if value == value})


#: A critic is loaded once for a training, whatever number of steps asks it.
critic_reward = cache(CriticReward)


@cache
def custom_reward(path: str) -> Reward:
    """The reward at a dotted path; a class is made without arguments."""
    found: Any = resolve(path, {}, "reward")
    return found() if isinstance(found, type) else found
