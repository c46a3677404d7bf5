"""Judges and an arm for tests of evaluation, found by dotted path."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from emoloop.agents.rewriters import Rewrite


class Light:
    """Valence is light, arousal is contrast; not what `scripted` goes by."""

    version = 1

    def read(self, images):
        found = []
        for image in images:
            pixels = np.asarray(image, dtype=float) / 255
            found.append(
                SimpleNamespace(
                    valence=float(np.clip(6 * pixels.mean() - 3, -3, 3)),
                    arousal=float(np.clip(12 * pixels.std() - 3, -3, 3)),
                    category="awe" if pixels.mean() > 0.5 else "sadness",
                    subject="dog" if pixels[..., 0].mean() > pixels[..., 2].mean() else "cat",
                    features=pixels[::8, ::8].ravel(),
                )
            )
        return found

    def subject_of(self, prompt):
        return next((word for word in ("dog", "cat") if word in prompt), None)


class Guard(Light):
    """The same with alignment."""

    def alignment(self, image, prompt):
        return float(np.asarray(image).mean() / 255)


async def twice(harness, request, seed, name):
    """An arm of somebody's own."""
    from emoloop.evals.arms import Arm

    arm = Arm(name, {"rewriter": "eval_parts:Bright", "rewrite_first": True, "rounds": 1})
    return await harness.run(arm, request, seed)


class Bright:
    """A rewriter of somebody's own."""

    name = model = "bright"
    prompt_id = "bright@1"

    def __init__(self, asker, prompt):
        pass

    async def rewrite(self, request):
        return Rewrite(f"bright {request.neutral}", "light")


def painter(settings):
    """A generator that is quick and may fail."""
    from painter import Painter

    return Painter()


def odd(critique, target):
    """A reward that never gives a number."""
    return float("nan")
