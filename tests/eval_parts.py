"""Judges and an arm for tests of evaluation, found by dotted path."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


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


async def twice(kit, request, seed, name):
    """An arm of somebody's own."""
    from emoloop.evals.kit import Take

    take = Take(kit, name, request, seed)
    await take.round(f"bright {request.prompt}")
    return await take.all()


def painter(settings):
    """A generator that is quick and may fail."""
    from painter import Painter

    return Painter()


def odd(critique, target):
    """A reward that never gives a number."""
    return float("nan")
