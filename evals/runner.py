"""The runner: arms × requests × judge, resumable by the log alone.

It makes what is missing, reads what was handed over, and returns rows; `analysis.py` turns rows into figures.
Requests of all arms that share models run side by side, so that the generator's and the LVLM's batches fill.
Arms on other models come one after the other, so that one generator is in memory at a time. Several
processes may fill one log: `shard` splits the requests by prompt, one process for each GPU.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..agents.ask import one_line
from ..agents.rewriters import RewriteRequest
from ..domain import Candidate, Failure, UserError
from ..graph.knowledge import Knowledge
from ..graph.loop import open_loop
from ..settings import Settings, load_settings, merged
from ..tools import presets
from ..tools.fingerprint import content_hash
from ..tools.images.base import ImageRequest
from ..tools.registry import resolve
from ..traces.blobs import BlobStore
from ..traces.database import log_exists
from ..traces.store import open_store
from .arms import Arm, Harness
from .judges import Item, Judge
from .records import Outcome, Reading, Row
from .reuse import Kept, Reuse, digest
from .suites import Request, Suite

logger = logging.getLogger(__name__)

#: Times that a machine's pace is taken.
_PACES = 3

#: Requests at work at once: enough to fill batches, few enough to keep memory small.
CONCURRENCY = 16


def home_of(settings: Settings) -> Path:
    """Where evaluations keep log, images and readings: apart from the runs that distillation learns from."""
    return settings.home / "evals"


def settings_of(settings: Settings, models: dict[str, Any]) -> Settings:
    """The settings of the arms that set `models`.

    Raises:
        UserError: An unknown setting or a value out of range.
    """
    # An adapter is an arm's own, and nobody is there to answer a review.
    ours = {"home": home_of(settings), "generator": {"adapter": None}, "loop": {"review": False}}
    return load_settings(merged(ours, models), settings)


@asynccontextmanager
async def open_harness(
    suite: Suite, settings: Settings, models: dict[str, Any] | None = None, lvlm: Any = None
) -> AsyncIterator[Harness]:
    """A loop for the arms that share their models.

    Args:
        suite: Rounds and images.
        settings: With the suite's overrides in force already.
        models: What these arms set besides.
        lvlm: A chat model instead of the settings' one.
    """
    # What arms may know comes from the log beside, as it stands: theirs has the answers of other arms.
    known = open_store(settings, read_only=True) if log_exists(settings) else None
    log, settings = settings, settings_of(settings, models or {})
    async with open_loop(settings, lvlm=lvlm) as loop:
        loop.parts.knowledge = Knowledge(known, loop.parts.generator)
        critic, rewriter = loop.parts.critic, loop.parts.rewriter(settings.loop.rewriter)
        model: Any = settings.lvlm.model
        if lvlm is None and settings.lvlm.engine == "embedded":
            folder = presets.resolve(model, "lvlm")
            model = content_hash(folder) if isinstance(folder, Path) else folder
        reader = {
            "model": model,
            "name": critic.model,
            "prompts": [critic.prompt.id, rewriter.prompt_id],
            "samples": critic.samples,
            "temperature": [settings.lvlm.temperature, settings.lvlm.rewriter_temperature],
            "max_tokens": settings.lvlm.max_tokens,
        }
        reuse = Reuse(loop.parts, reader)
        try:
            yield Harness(loop, suite, reuse, log)
        finally:
            await reuse.aclose()
            if known is not None:
                known.close()


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
        progress: Shows how far it is.
        shard: (which, of how many): this process answers every how-manieth prompt.
        lvlm: A chat model instead of the settings' one.

    Raises:
        Failure: An arm failed on every request; the first reason.
    """
    progress, started = progress or Progress(disable=True), time.perf_counter()
    which, many = shard
    prompts = list(dict.fromkeys(request.prompt for request in suite.requests))[which::many]
    requests = [request for request in suite.requests if request.prompt in prompts]
    kept = Kept(home_of(settings) / "cache")
    rows: dict[tuple[str, str], Row] = {}
    outcome = Outcome([], home_of(settings), {}, {}, 0, 0.0, {}, suite=suite)
    step = partial(progress.advance, progress.add_task("requests × arms", total=len(requests) * len(arms)))
    groups = {json.dumps(arm.models, sort_keys=True): arm.models for arm in arms}
    for models in groups.values():
        async with open_harness(suite, settings, models, lvlm) as harness:
            here = [arm for arm in arms if arm.models == models]
            group = await _answers(harness, suite, here, requests, step)
            rows |= {(row.arm, row.request.id): row for row in group}
            # One of several would measure how it waits for the others.
            if many == 1 and not (models and outcome.pace):
                outcome.pace = await measure_pace(harness, group, kept)
            await read(group, judge, guard, kept, harness.reuse.store.blobs, progress)
            if suite.measures and not models and many == 1:
                measure = resolve(suite.measures, {}, "measures")
                outcome.measures = await measure(harness.loop.parts, group, outcome.pace)
            outcome.made += harness.reuse.fresh
            adapter = models.get("generator", {}).get("adapter")
            alone = models == {"generator": {"adapter": adapter}}
            label = adapter if alone else json.dumps(models) if models else ""
            outcome.generators[label] = harness.reuse.generator.describe()
            outcome.identity = {**harness.identity, **outcome.identity}
    outcome.rows = [rows[arm.name, request.id] for arm in arms for request in requests]
    outcome.seconds = time.perf_counter() - started
    return outcome


async def _answers(
    harness: Harness, suite: Suite, arms: Sequence[Arm], requests: Sequence[Request], step: Callable[[], None]
) -> list[Row]:
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(arm: Arm, request: Request) -> Row:
        async with slots:
            try:
                answer = arm.answer or (lambda harness, request, seed, _: harness.run(arm, request, seed))
                return await answer(harness, request, suite.seed_of(request.prompt), arm.name)
            except UserError:
                raise
            except Exception as error:  # what went wrong with one request must not end the others
                logger.warning("%s on %r failed", arm.name, request.prompt, exc_info=error)
                return Row(arm.name, request, failure=one_line(error))
            finally:
                step()

    try:
        async with asyncio.TaskGroup() as group:
            # Request by request, not arm by arm: what arms share is made just before it is used again.
            tasks = [group.create_task(one(arm, request)) for request in requests for arm in arms]
    except* UserError as errors:
        raise errors.exceptions[0] from None
    rows = [task.result() for task in tasks]
    for arm in arms:
        reasons = [row.failure for row in rows if row.arm == arm.name]
        if reasons and all(reasons):
            raise Failure(f"arm {arm.name!r} failed on all {len(reasons)} requests: {reasons[0]}")
    return rows


async def read(
    rows: Sequence[Row],
    judge: Judge,
    guard: Judge | None,
    kept: Kept,
    blobs: BlobStore,
    progress: Progress,
) -> None:
    """Fill `readings`, `led` and `guard` of the rows; an image that was read before is not read again."""
    shown = [(row.request, [*row.handed_over, *(one for _, one in row.leaders)]) for row in rows]
    for row, readings in zip(rows, await _read(judge, shown, kept, blobs, progress), strict=True):
        if row.handed_over:  # an arm without pictures has said what it reads
            count = len(row.handed_over)
            row.readings, row.led = readings[:count], readings[count:]
    siblings = [(row.request, row.siblings) for row in rows]
    for row, readings in zip(rows, await _read(guard, siblings, kept, blobs, progress), strict=True):
        row.guard = readings


async def _read(
    judge: Judge | None,
    wanted: Sequence[tuple[Request, Sequence[Candidate]]],
    kept: Kept,
    blobs: BlobStore,
    progress: Progress,
) -> list[list[Reading | None]]:
    if judge is None:
        return [[None] * len(shown) for _, shown in wanted]

    def key_of(request: Request, one: Candidate) -> str:
        target = request.target.model_dump(mode="json") if judge.sees_target else None
        return digest("reading", judge.name, judge.version, one.sha256, request.prompt, target)

    keys = [[key_of(request, one) for one in shown] for request, shown in wanted]
    items = {
        key: Item(one.sha256, blobs, request.prompt, request.target)
        for (request, shown), row in zip(wanted, keys, strict=True)
        for one, key in zip(shown, row, strict=True)
    }
    known = {key: kept.get(key) for key in items}
    found = {key: None if it is None else Reading.model_validate(it) for key, it in known.items()}
    new = [key for key in items if known[key] is None]
    task = progress.add_task(f"readings by {judge.name}", total=len(new))
    for start in range(0, len(new), 64):
        part = new[start : start + 64]
        for key, reading in zip(part, await judge.read([items[key] for key in part]), strict=True):
            found[key] = reading
            if reading is not None:
                kept.put(key, reading.model_dump(mode="json", exclude_none=True))
        progress.advance(task, len(part))
    return [[found[key] for key in row] for row in keys]


async def measure_pace(harness: Harness, rows: Sequence[Row], kept: Kept) -> dict[str, float]:
    """Seconds for one image, critique and rewrite when batches are full; measured once for each device.

    The time that a run of the loop notes is no measure here, since arms run side by side and wait for each
    other.
    """
    reuse = harness.reuse
    key = digest("pace", harness.identity, reuse.generator.describe().get("device"), torch.get_num_threads())
    shown = [(row.request, one) for row in rows for one in row.made][:8]
    if (known := kept.get(key)) is not None or not shown:
        return known or {}
    rewriter = reuse.rewriter(harness.loop.settings.loop.rewriter)
    drawn = [ImageRequest(one.prompt, one.seed or 0, request.target) for request, one in shown]
    pace: dict[str, float] = {}

    def note(what: str, seconds: float) -> None:
        # The first call of each model loads it or tries its batches out, and other work on a machine only slows: the
        # fastest of several is nearest to what the models take.
        pace[what] = min(pace.get(what, math.inf), seconds / len(shown))

    async def timed(what: str, calls: Iterable[Awaitable[Any]]) -> None:
        clock = time.perf_counter()
        await asyncio.gather(*calls)
        note(what, time.perf_counter() - clock)

    try:
        for _ in range(_PACES):
            made = await reuse.generator.generate(drawn)
            note("image", sum(one.provenance.get("seconds") or 0.0 for one in made))
            reads = zip(made, shown, strict=True)
            await timed(
                "critique", (reuse.critic.read(one.image, it.prompt, it.target) for one, (it, _) in reads)
            )
            await timed(
                "rewrite", (rewriter.rewrite(RewriteRequest(it.prompt, it.target)) for it, _ in shown)
            )
    except Exception:  # a model that fails now has been reported by the arms
        return {}
    kept.put(key, pace)
    return pace
