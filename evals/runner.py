"""The runner: arms × requests × judge, resumable, everything kept by content.

It makes what is missing, reads what was handed over, and returns rows; `analysis.py` turns rows into figures.
Requests of all arms that share weights run side by side, so that the generator's and the LVLM's batches fill.
Arms on other weights come one after the other, so that one generator is in memory at a time. Several
processes may fill one cache: `shard` splits the requests by prompt, one process for each GPU.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..agents.ask import one_line
from ..domain import UserError
from ..settings import Settings
from ..tools.fingerprint import content_hash
from ..tools.images.base import ImageRequest
from ..tools.images.load import load_generator
from ..tools.registry import resolve
from ..traces.blobs import BlobStore
from .arms import Arm, deliver
from .cache import Cache, digest
from .judges import Item, Judge
from .kit import CachedGenerator, Kit
from .records import Delivery, Outcome, Reading, Row, Shot
from .stats import Estimate
from .suites import Request, Suite

if TYPE_CHECKING:
    from ..graph.parts import Parts

logger = logging.getLogger(__name__)

#: Times that a machine's pace is taken.
_PACES = 3

#: Requests at work at once: enough to fill batches, few enough to keep memory small.
CONCURRENCY = 16


class EvaluationFailed(Exception):
    """An arm answered nothing at all: one line that says why (exit code 1)."""


class Progress:
    """Told how far it is; the default says nothing."""

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, n: int = 1) -> None:
        """`n` steps are done."""


def home_of(settings: Settings) -> Path:
    """Where evaluations keep log, images and cache: apart from the runs that distillation learns from."""
    return settings.home / "evals"


@asynccontextmanager
async def open_kit(
    suite: Suite, settings: Settings, adapter: Path | None, lvlm: Any = None
) -> AsyncIterator[Kit]:
    """Everything for the arms on one set of weights.

    Args:
        suite: Rounds and images.
        settings: With the suite's overrides in force already.
        adapter: Artifact to carry.
        lvlm: A chat model instead of the settings' one.
    """
    from ..graph.loop import open_loop

    home = home_of(settings)
    generating = settings.generator.model_copy(update={"adapter": str(adapter) if adapter else None})
    # Nobody is there to answer a review.
    looping = settings.loop.model_copy(update={"review": False})
    ours = settings.model_copy(update={"home": home, "generator": generating, "loop": looping})
    cache = Cache(home / "cache")
    inner = await asyncio.to_thread(load_generator, generating)
    try:
        generator = CachedGenerator(inner, cache, BlobStore(home / "blobs"))
        async with open_loop(ours, generator=generator, lvlm=lvlm) as loop:
            parts = loop.parts
            yield Kit(
                settings=ours,
                images=suite.images,
                rounds=suite.rounds,
                generator=generator,
                critic=parts.critic,
                rewriter=parts.rewriter(ours.loop.rewriter),
                reward=parts.reward,
                recorder=parts.recorder,
                loop=loop,
                cache=cache,
                identity={"generator": generator.identity, **_identity(ours, parts, lvlm is None)},
            )
    finally:
        await cache.aclose()
        await inner.aclose()


def _identity(settings: Settings, parts: Parts, own: bool) -> dict[str, Any]:
    from ..tools import presets

    model: Any = settings.lvlm.model
    if own and settings.lvlm.engine == "embedded":
        folder = presets.resolve(model, "lvlm")
        model = content_hash(folder) if isinstance(folder, Path) else folder
    return {
        "lvlm": {
            "model": model,
            "name": parts.critic.model,
            "prompts": [parts.critic.prompt.id, parts.rewriter(settings.loop.rewriter).prompt_id],
            "samples": parts.critic.samples,
            "temperature": settings.lvlm.temperature,
            "max_tokens": settings.lvlm.max_tokens,
        },
        "reward": [parts.reward.name, parts.reward.version],
        "loop": settings.loop.model_dump(include={"tolerance", "patience"}),
    }


async def run(
    suite: Suite,
    settings: Settings,
    arms: Sequence[Arm],
    judge: Judge,
    guard: Judge | None = None,
    progress: Progress | None = None,
    shard: tuple[int, int] = (0, 1),
    lvlm: Any = None,
) -> Outcome:
    """Answer every request with every arm and have it read.

    Args:
        suite: The suite.
        settings: Resolved settings with the suite's overrides.
        arms: The arms.
        judge: Reads what is handed over.
        guard: Reads it too, with the siblings, for alignment, diversity and smoothness.
        progress: Is told.
        shard: (which, of how many): this process answers every how-manieth prompt.
        lvlm: A chat model instead of the settings' one.

    Raises:
        EvaluationFailed: An arm failed on every request; the first reason.
    """
    progress, started = progress or Progress(), time.perf_counter()
    which, many = shard
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(r.prompt for r in suite.requests))}
    requests = [request for request in suite.requests if prompts[request.prompt] % many == which]
    rows: dict[tuple[str, str], Row] = {}
    described: dict[str, dict[str, Any]] = {}
    identity: dict[str, Any] = {}
    pace: dict[str, float] = {}
    measures: dict[str, Estimate] = {}
    made = 0
    progress.begin("requests × arms", len(requests) * len(arms))
    for adapter in dict.fromkeys(arm.adapter for arm in arms):
        async with open_kit(suite, settings, adapter, lvlm) as kit:
            here = [arm for arm in arms if arm.adapter == adapter]
            group = await _answers(kit, suite, here, requests, progress)
            rows |= {(row.arm, row.request.id): row for row in group}
            # One of several would measure how it waits for the others.
            if many == 1 and (adapter is None or not pace):
                pace = await measure_pace(kit, group)
            await read(group, judge, guard, kit.cache, kit.generator.blobs.path, progress)
            if suite.measures and adapter is None and many == 1:
                measures = await resolve(suite.measures, {}, "measures")(kit, group, pace)
            made += kit.generator.fresh
            described[str(adapter or "")] = kit.generator.describe()
            identity = {**kit.identity, **identity}
    return Outcome(
        rows=[rows[arm.name, request.id] for arm in arms for request in requests],
        home=home_of(settings),
        generators=described,
        identity=identity,
        made=made,
        seconds=time.perf_counter() - started,
        pace=pace,
        measures=measures,
    )


async def _answers(
    kit: Kit, suite: Suite, arms: Sequence[Arm], requests: Sequence[Request], progress: Progress
) -> list[Row]:
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(arm: Arm, request: Request) -> Row:
        async with slots:
            delivery = await _answer(arm, kit, request, suite.seed_of(request.prompt))
            progress.step()
            return Row(arm.name, request, delivery, siblings=_siblings(delivery))

    try:
        async with asyncio.TaskGroup() as group:
            # Request by request, not arm by arm: what arms share is made just before it is used again.
            tasks = [group.create_task(one(arm, request)) for request in requests for arm in arms]
    except* UserError as errors:
        raise errors.exceptions[0] from None
    rows = [task.result() for task in tasks]
    for arm in arms:
        reasons = [row.delivery.failure for row in rows if row.arm == arm.name]
        if reasons and all(reasons):
            raise EvaluationFailed(f"arm {arm.name!r} failed on all {len(reasons)} requests: {reasons[0]}")
    return rows


async def _answer(arm: Arm, kit: Kit, request: Request, seed: int) -> Delivery:
    """A delivery; what went wrong with one request is noted and must not end the others."""
    try:
        return await deliver(arm.answer, arm.name, kit, request, seed, arm.version)
    except UserError:
        raise
    except Exception as error:
        logger.warning("%s on %r failed", arm.name, request.prompt, exc_info=error)
        return Delivery(arm=arm.name, request=request.id, failure=one_line(error))


def _siblings(delivery: Delivery) -> list[Shot]:
    handed = delivery.handed_over
    if len(handed) != 1:
        return handed
    return [shot for shot in delivery.shots if shot.prompt == handed[0].prompt]


async def read(
    rows: Iterable[Row],
    judge: Judge,
    guard: Judge | None,
    cache: Cache,
    path: Callable[[str], Path],
    progress: Progress | None = None,
) -> None:
    """Fill `readings` and `guard` of the rows; an image that was read before is not read again."""
    rows = list(rows)
    for reader, field_, shots in (
        (judge, "readings", [row.delivery.handed_over for row in rows]),
        (guard, "guard", [row.siblings for row in rows]),
    ):
        if reader is None:
            for row, those in zip(rows, shots, strict=True):
                setattr(row, field_, [None] * len(those))
            continue
        items: dict[str, Item] = {}
        keys: list[list[str]] = []
        for row, those in zip(rows, shots, strict=True):
            here = []
            for shot in those:
                target = row.request.target.model_dump(mode="json") if reader.sees_target else None
                key = digest("reading", reader.name, reader.version, shot.sha256, row.request.prompt, target)
                items.setdefault(
                    key, Item(shot.sha256, path(shot.sha256), row.request.prompt, row.request.target)
                )
                here.append(key)
            keys.append(here)
        found: dict[str, Reading | None] = {}
        for key in items:
            known = cache.get(key)
            if known is not None:
                found[key] = Reading.model_validate(known)
        new = [key for key in items if key not in found]
        if progress:
            # Judge and guard may have one name; what is known already is no work.
            progress.begin(f"readings by {reader.name}", len(new))
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            for key, reading in zip(part, await reader.read([items[key] for key in part]), strict=True):
                found[key] = reading
                if reading is not None:
                    cache.put(key, reading.model_dump(mode="json", exclude_none=True))
            if progress:
                progress.step(len(part))
        for row, here in zip(rows, keys, strict=True):
            setattr(row, field_, [found[key] for key in here])


async def measure_pace(kit: Kit, rows: Sequence[Row]) -> dict[str, float]:
    """Seconds for one image, critique and rewrite when batches are full; measured once for each device.

    The time that a run of the loop notes is no measure here, since arms run side by side and wait for each
    other.
    """
    device = kit.generator.describe().get("device")
    key = digest("pace", kit.identity, device, torch.get_num_threads())

    async def make() -> dict[str, float]:
        shots = [(row.request, shot) for row in rows for shot in row.delivery.shots][:8]
        if not shots:
            return {}
        # The first call of each model loads it or tries its batches out, and other work on a machine only slows: the
        # fastest of several is nearest to what the models take.
        made: list[Any] = []
        image: list[float] = []
        for _ in range(_PACES):
            made = await kit.generator.inner.generate(_again(shots))
            image.append(sum(one.provenance.get("seconds") or 0.0 for one in made) / len(made))

        async def fastest(call: Callable[[Request, Any], Any]) -> float:
            found = []
            for _ in range(_PACES):
                clock = time.perf_counter()
                calls = [call(request, one.image) for (request, _), one in zip(shots, made, strict=True)]
                await asyncio.gather(*calls)
                found.append((time.perf_counter() - clock) / len(shots))
            return min(found)

        return {
            "image": min(image),
            "critique": await fastest(lambda it, picture: kit.critic.read(picture, it.prompt, it.target)),
            "rewrite": await fastest(lambda it, _: kit.rewriter.rewrite(it.prompt, it.target)),
        }

    try:
        return await kit.cache.once(key, make)
    except Exception:  # a model that fails now has been reported by the arms
        return {}


def _again(shots: Sequence[tuple[Request, Shot]]) -> list[Any]:
    return [ImageRequest(shot.prompt, shot.seed, request.target) for request, shot in shots]
