"""A generator of your own: anything that turns an `ImageRequest` into a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from emoloop import EmotionTarget, open_loop
from emoloop.settings import GeneratorSettings
from emoloop.tools.images.base import ImageRequest
from PIL import Image


class Gradients:
    """Paints a sky over a ground; `sunny` makes both lighter. The same prompt and seed give the same picture."""

    def __init__(self, settings: GeneratorSettings | None = None) -> None:
        self.size = (settings and settings.height) or 96

    def generate(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """Make the pictures, in the order of the requests; a plain function is run in a thread."""
        return [self._paint(request) for request in requests]

    def _paint(self, request: ImageRequest) -> Image.Image:
        random = np.random.default_rng(request.seed)
        top, bottom = random.integers(40, 200, (2, 3)) + 55 * ("sunny" in request.prompt)
        share = np.linspace(0, 1, self.size)[:, None, None]
        rows = np.broadcast_to((1 - share) * top + share * bottom, (self.size, self.size, 3))
        return Image.fromarray(rows.clip(0, 255).astype(np.uint8))

    def describe(self) -> dict[str, Any]:
        """What the log says of the making; a resumed run must find the same."""
        return {"model": "gradients-1", "height": self.size, "width": self.size}


if __name__ == "__main__":
    # A dotted path works in settings and on the command line (`--model my_generator:Gradients`);
    # an object of the class works as well.
    with open_loop(generator="my_generator:Gradients", loop={"rounds": 2, "images": 2}) as loop:
        result = loop.run_sync("a sunny field", EmotionTarget(valence=2), seed=1)
    assert result.best is not None, result.warnings
    print(f"{result.best.model}: best reward {result.best.reward:.2f}")
