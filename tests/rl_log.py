"""Small synthetic logs with real events and real PNGs, for tests of distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from emoloop.domain import Critique, Emotion, EmotionTarget, Missing, RunStatus, StopReason
from emoloop.events import Critiqued, Event, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from emoloop.settings import Settings, load_settings
from emoloop.traces.store import TraceStore, open_store
from PIL import Image

PROMPTS = ("a dog", "a cat", "a house by the sea", "a boat", "a red house", "the sea", "a calm dog", "a hill")


def settings_for(home: Path, **more: object) -> Settings:
    return load_settings({"home": str(home), **more})


def noise_image(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def default_reward(run: int, round_: int, index: int) -> float | None:
    """Rises by .3 a round, differs within a round."""
    return round(-0.2 + 0.3 * round_ + 0.05 * ((run + 3 * index) % 4), 4)


class Seeing:
    """A reward that looks at the picture: the reading's valence and the mean of its pixels."""

    name, version = "seeing", "1"

    def __call__(self, picture, prompt, critique, target):
        return critique.valence + np.asarray(picture).mean()


class Pleased:
    """A newcomer's reward: pleasure, and a point for the wanted category."""

    name, version = "pleased", "1"

    def __call__(self, critique: Critique, target: EmotionTarget) -> float:
        return critique.valence + (critique.category == target.category)


def run_events(
    store: TraceStore,
    run: int,
    *,
    rounds: int = 2,
    images: int = 3,
    model: str = "tiny",
    revision: str | None = "r1",
    adapter: str | None = None,
    reward: Callable[[int, int, int], float | None] = default_reward,
    reward_name: str = "emotion",
    spread: float | None = None,
    prompt: str | None = None,
    target: EmotionTarget | None = None,
    category: Emotion | None = None,
    reward_path: str | None = None,
    reading: Callable[[int, int], tuple[float, float]] = lambda round_, index: (0.1 * index, 0.0),
) -> list[Event]:
    run_id = f"run-{run:04d}"
    neutral = prompt or PROMPTS[run % len(PROMPTS)]
    target = target or EmotionTarget(valence=round(-2 + run % 5, 1), arousal=round(2 - run % 4, 1))
    settings = {} if reward_path is None else {"loop": {"reward": reward_path}}
    out: list[Event] = [RunStarted(run_id=run_id, prompt=neutral, target=target, seed=run, settings=settings)]
    for round_ in range(rounds):
        text = neutral if round_ == 0 else f"{neutral} bright {round_}"
        if round_:
            out.append(Rewritten(run_id=run_id, round=round_, prompt=text, model="l", prompt_version="1"))
        for index in range(images):
            seed = 1000 * run + 10 * round_ + index
            sha = store.blobs.put_image(noise_image(seed))
            value = reward(run, round_, index)
            place = {"run_id": run_id, "round": round_, "index": index}
            out.append(
                ImageGenerated(
                    **place,
                    sha256=sha,
                    prompt=text,
                    seed=seed,
                    model=model,
                    revision=revision,
                    adapter=adapter,
                    steps=2,
                    guidance=3.0,
                    height=32,
                    width=32,
                )
            )
            if value is None:
                critique: Critique | Missing = Missing(reason="the critic timed out")
            else:
                critique = Critique(
                    valence=reading(round_, index)[0],
                    arousal=reading(round_, index)[1],
                    category=category,
                    alignment=1.0,
                    valence_spread=spread,
                    arousal_spread=spread,
                )
            out.append(Critiqued(**place, sha256=sha, critique=critique, model="l", prompt_version="1"))
            reason = None if value is not None else "the critic timed out"
            out.append(
                Rewarded(**place, sha256=sha, name=reward_name, version="1", value=value, reason=reason)
            )
    out.append(
        RunFinished(
            run_id=run_id, round=rounds - 1, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED
        )
    )
    return out


def write_log(home: Path, runs: int = 12, **how: object) -> Settings:
    settings = settings_for(home)
    with open_store(settings) as store:
        for run in range(runs):
            store.append(*run_events(store, run, **how))  # type: ignore[arg-type]
    return settings
