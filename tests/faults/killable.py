"""A process that runs the loop with rules for models, slowly enough to be killed.

`killable.py HOME resume|run [REWRITER]`
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cast import Looking
from emoloop.domain import EmotionTarget
from emoloop.events import RunStarted
from emoloop.graph.loop import open_loop
from painter import Painter
from scripted import Scripted


async def main(home: str, resume: bool, rewriter: str = "simple") -> None:
    def tell(message: object) -> None:
        if isinstance(message, RunStarted):
            print(f"run {message.run_id}", file=sys.stderr, flush=True)

    loop = open_loop(
        generator=Painter(delay=0.02),
        lvlm=Scripted(delay=0.02) if rewriter == "simple" else Looking(delay=0.02),
        home=home,
        loop={"rounds": 3, "images": 4, "patience": 3, "rewriter": rewriter},
    )
    async with loop:
        if resume:
            await loop.resume("last", on_event=tell)
        else:
            await loop.run("a dog", EmotionTarget(valence=2, arousal=-1), seed=7, on_event=tell)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] == "resume", *sys.argv[3:]))
