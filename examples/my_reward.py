"""A reward of your own in one file, named by a dotted path."""

from dataclasses import dataclass

from emoloop import Critique, EmotionTarget, open_loop
from PIL import ImageStat
from PIL.Image import Image


@dataclass(frozen=True)
class Distance:
    """Minus the Euclidean distance on the (valence, arousal) plane; an axis that is not wanted counts nothing."""

    # Both go into the log with each value; raise the version when a value may change.
    name: str = "distance"
    version: str = "1"

    def __call__(self, critique: Critique, target: EmotionTarget) -> float:
        """Higher is better; the scale is the reward's own."""
        pairs = zip((critique.valence, critique.arousal), target.point, strict=True)
        return -(sum((read - aim) ** 2 for read, aim in pairs if aim is not None) ** 0.5)


async def kept(critique: Critique, target: EmotionTarget) -> float:
    """A plain function will do, async too; it is logged by its name, with version 0."""
    return critique.alignment


def light(picture: Image, prompt: str, critique: Critique, target: EmotionTarget) -> float:
    """By these four names it gets the picture and the neutral prompt too: here how far its light is from the wish."""
    return -abs(ImageStat.Stat(picture.convert("L")).mean[0] / 255 - (target.valence or 0) / 6 - 0.5)


if __name__ == "__main__":
    # The same on the command line: `emoloop run … --reward my_reward:Distance`
    for reward in ("my_reward:Distance", kept, {"my_reward:Distance": 1, "my_reward:light": 2}):
        with open_loop(reward=reward, loop={"rounds": 1, "images": 4}) as loop:
            result = loop.run_sync("a dog by the sea", EmotionTarget(valence=2, arousal=-1), seed=7)
            name = loop.parts.reward.name
        print(name, [candidate.reward for candidate in result.rounds[0].candidates])
