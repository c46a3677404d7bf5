"""A judge of your own in one file: it reads the pictures that the arms deliver."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emoloop import evaluate
from PIL.Image import Image


@dataclass(frozen=True)
class Seen:
    """What it says of a picture; `category`, `subject` and `features` may be there as well, None is unsaid."""

    valence: float | None
    arousal: float | None


class Light:
    """Valence from light, arousal from colour. A stand-in: take a model that never gave a reward."""

    version = "1"

    def read(self, images: list[Image]) -> list[Seen]:
        """One reading for each picture, in order."""
        pixels = [np.asarray(image, dtype=float) / 255 for image in images]
        return [Seen(6 * p.mean() - 3, min(3.0, 12 * p.std(2).mean() - 3)) for p in pixels]


if __name__ == "__main__":
    suite = Path(__file__).with_name("suite.yaml")
    # The same on the command line: `emoloop eval suite.yaml --judge my_judge:Light`
    report = evaluate(suite, "report", judge="my_judge:Light")
    for arm in ("base", "loop"):
        print(arm, report["figures"][f"{arm}_error"])
    print("report/report.html")
