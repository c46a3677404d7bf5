"""Many runs from a file or a pipe of prompts: queued, worked on, in bounded memory, exactly resumable.

The lines go into the log's queue some hundred ahead of the work; a worker of this process takes them, and so does every
`emoloop worker` of the same models. A line's run is named by what the line says, where it stands and what the loop is
made of, so the same command goes on where it broke off, tries again what failed, and never takes another model's run
for its own. What cannot be run goes to a dead-letter file with its reason, in the form that `collect` reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from ..domain import EmotionTarget, RunStatus, UserError, read_target
from ..traces.database import StoreError
from ..traces.queue import ENDED
from ..traces.rows import RunFilter, RunRow
from ..traces.store import TraceStore
from .loop import Loop
from .state import candidate_seed, read_prompt, read_seed
from .worker import POLL, Worker

T = TypeVar("T")

#: Lines that are queued and not done, and lines that are queued at once, at most.
_AHEAD, _CHUNK = 1024, 128

#: What a line may say, besides its target.
_OPTIONS = ("rounds", "images", "tolerance", "patience")
_TARGET = ("valence", "arousal", "category", "emotion")
#: What a dead-letter line says in addition.
_LETTER = ("line", "error", "run_id")


@dataclass(frozen=True)
class Request:
    """One readable line.

    Attributes:
        line: Its number in the file, from 1.
        prompt: The neutral prompt.
        target: The wanted emotion.
        seed: As given, or None.
        options: `rounds`, `images`, `tolerance`, `patience` where given.
    """

    line: int
    prompt: str
    target: EmotionTarget
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Outcome:
    """What became of one line.

    Attributes:
        line: Its number.
        run_id: The run, or None for a line that could not be read.
        error: Why there is no complete run; None where there is.
        images: Pictures made for it, now or before.
        known: Whether the run was complete before this call.
        gain: The run's gain.
    """

    line: int
    run_id: str | None
    error: str | None
    images: int = 0
    known: bool = False
    gain: float | None = None


def read_line(number: int, text: str) -> Request:
    """Read one line: `{"prompt": …, "valence": …, "arousal": …, "category": …}`, or with a `target` object.

    Also `seed`, `rounds`, `images`, `tolerance`, `patience`. A dead letter of a line that could not be read holds
    it under `raw` and is read again.

    Raises:
        UserError: Not a JSON object, an unknown key, or a request that makes no sense.
    """
    try:
        read = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(read, dict):
        raise UserError("a JSON object is wanted")
    given: dict[str, Any] = read
    if isinstance(given.get("raw"), str):
        return read_line(_line_of(given, number), given["raw"])
    known = ("prompt", "target", "seed", *_TARGET, *_OPTIONS, *_LETTER)
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"unknown key {', '.join(unknown)}: known are {', '.join(known[: -len(_LETTER)])}")
    flat = {key: given[key] for key in _TARGET if given.get(key) is not None}
    if flat and "target" in given:
        raise UserError("give the target as an object or as keys, not both")
    return Request(
        line=_line_of(given, number),
        prompt=read_prompt(given.get("prompt")),
        target=read_target(given.get("target", flat)),
        seed=read_seed(given.get("seed")),
        options={key: given[key] for key in _OPTIONS if given.get(key) is not None},
    )


def _line_of(given: dict[str, Any], number: int) -> int:
    line = given.get("line", number)
    return line if isinstance(line, int) else number


def fingerprint(loop: Loop, seed: int) -> str:
    """What the loop is made of, as a hash: all that changes what a run does."""
    parts = loop.parts
    made = parts.generator.describe()
    keys = ("model", "revision", "adapter", "steps", "guidance", "height", "width", "negative_prompt")
    lvlm = loop.settings.lvlm
    # Named only where they are not the default, so that a collection begun before they existed goes on.
    newer = {"rewriter", "rewrite_first", "exhaust", "proposals", "neutral_images"}
    newer |= {"max_images", "max_calls", "max_seconds", "finalists", "oversample", "memory"}
    newer |= {"personas", "persona_folder"}
    newer -= loop.settings.loop.model_dump(exclude_defaults=True).keys()
    facts = {
        "seed": seed,
        "generator": {key: made.get(key) for key in keys},
        "adapter_scale": loop.settings.generator.adapter_scale,
        "lvlm": [parts.critic.model, lvlm.temperature, lvlm.samples],
        "prompts": [parts.critic.prompt.id, parts.rewriter(loop.settings.loop.rewriter).prompt_id],
        "reward": [parts.reward.name, parts.reward.version],
        "loop": loop.settings.loop.model_dump(
            mode="json", exclude={"node_timeout", "review", "reward", *newer}
        ),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def run_id_of(request: Request, print_: str) -> str:
    """The name of a line's run."""
    asked = [
        request.line,
        request.prompt,
        request.target.model_dump(mode="json", exclude_none=True),
        request.seed,
        request.options,
        print_,
    ]
    return "c-" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


async def collect(
    loop: Loop,
    source: Path,
    dead_letters: Path,
    *,
    seed: int = 0,
    concurrency: int = 8,
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
) -> None:
    """Run every line of a file or a pipe.

    Args:
        loop: An open loop.
        source: JSON lines; blank ones are skipped.
        dead_letters: Where lines go that have no complete run; written anew, absent where there are none.
        seed: Lines without a seed get one from this and their number.
        concurrency: Runs at a time in this process; they share the models, and their requests share batches.
        on_outcome: Called for each line when it is done.

    Raises:
        UserError: The dead-letter file would overwrite the source, or cannot be written.
        StoreError: The log is lost; all runs stop.
        OSError: The dead-letter file cannot be written any more; all runs stop.
    """
    prints = fingerprint(loop, seed), fingerprint(loop, 0)
    crew = partial(Worker, loop, concurrency=concurrency, needs=prints[1])
    await collect_by(crew, loop.recorder.store, prints, source, dead_letters, seed, on_outcome)


class Crew(Protocol):
    """Who does what a collection has queued: a `Worker`, or several."""

    async def work(self) -> None:
        """Work until `drain` is called."""
        ...

    def drain(self) -> None:
        """Take no more."""
        ...

    def nudge(self) -> None:
        """Look into the queue now."""
        ...


async def collect_by(
    crew: Callable[..., Crew],
    store: TraceStore,
    prints: tuple[str, str],
    source: Path,
    dead_letters: Path,
    seed: int,
    on_outcome: Callable[[Outcome], object],
) -> None:
    """As `collect`, by whoever holds the models.

    Args:
        crew: Called with `batch` and `on_done`, as for `Worker`.
        store: The log.
        prints: The loop's fingerprint with the seed, and with 0: what the runs need.
        source: As for `collect`, and so are the others.
        dead_letters: "
        seed: "
        on_outcome: "
    """
    await asyncio.to_thread(_clear, dead_letters, source)
    collection = _Collection(store, prints, dead_letters, seed, on_outcome)
    worker = crew(batch=collection.batch, on_done=lambda item, error: collection.ended(item.id, error))
    parts = (collection.feed(read_lines(source), worker.nudge), worker.work(), collection.look())
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await collection.told(tasks)
        worker.drain()
        await tasks[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # What has not begun is not begun by others either; the same command queues it again.
        with suppress(StoreError):
            await asyncio.to_thread(store.queue.cancel, batch=collection.batch)


class _Collection:
    """The lines that are queued and not told yet, and what became of them."""

    def __init__(
        self,
        store: TraceStore,
        prints: tuple[str, str],
        dead_letters: Path,
        seed: int,
        on_outcome: Callable[[Outcome], object],
    ) -> None:
        self.batch = uuid4().hex
        self._store, self._seed = store, seed
        self._dead_letters, self._on_outcome = dead_letters, on_outcome
        self._print, self._needs = prints
        self._waiting: dict[str, list[tuple[int, str]]] = {}
        self._queued: set[str] = set()
        self._ended: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        self._room, self._all_read = asyncio.Event(), False

    def ended(self, run_id: str, error: str | None) -> None:
        """Hear that a run has ended."""
        self._ended.put_nowait((run_id, error))

    async def feed(self, lines: Iterator[tuple[int, str]], nudge: Callable[[], object]) -> None:
        """Queue the lines, some hundred ahead of the work."""
        async for some in _chunks(lines):
            wanted: dict[str, dict[str, Any]] = {}
            for number, text in some:
                try:
                    request = read_line(number, text)
                except UserError as error:
                    await self._tell(Outcome(number, None, str(error)), text)
                    continue
                run_id = run_id_of(request, self._print)
                self._waiting.setdefault(run_id, []).append((number, text))
                own = candidate_seed(self._seed, 0, request.line) if request.seed is None else request.seed
                target = request.target.model_dump(mode="json", exclude_none=True)
                wanted[run_id] = {"prompt": request.prompt, "target": target, "seed": own}
                wanted[run_id]["options"] = request.options
            known = await asyncio.to_thread(self._rows, list(wanted))
            complete = {it for it, row in known.items() if row.status is RunStatus.COMPLETED}
            for run_id in complete:
                for number, text in self._waiting.pop(run_id):
                    row = known[run_id]
                    await self._tell(Outcome(number, run_id, None, row.images, True, row.gain), text)
                del wanted[run_id]
            await asyncio.to_thread(self._store.queue.add, "run", wanted, batch=self.batch, needs=self._needs)
            self._queued |= wanted.keys() & self._waiting.keys()
            nudge()
            while len(self._waiting) >= _AHEAD:
                self._room.clear()
                await self._room.wait()
        self._all_read = True
        self._ended.put_nowait(("", None))

    async def look(self) -> None:
        """Hear of runs that other workers have ended."""
        while True:
            await asyncio.sleep(POLL)
            for item in await asyncio.to_thread(self._store.queue.items, list(self._queued)):
                if item.state in ENDED:
                    self.ended(item.id, item.error or (item.state if item.state != "done" else None))

    async def told(self, parts: Sequence[asyncio.Task[None]]) -> None:
        """Tell what became of each line, until all are told.

        Raises:
            Exception: That of a part which broke off.
        """
        for part in parts:
            part.add_done_callback(lambda _: self._ended.put_nowait(("", None)))
        while self._waiting or not self._all_read:
            run_id, error = await self._ended.get()
            for part in parts:
                if part.done():
                    part.result()
            # Who ended it and who looked may both say so.
            lines = self._waiting.pop(run_id, [])
            self._queued.discard(run_id)
            row = (await asyncio.to_thread(self._rows, [run_id])).get(run_id) if lines else None
            for number, text in lines:
                images, gain = (row.images, row.gain) if row else (0, None)
                await self._tell(Outcome(number, run_id, error, images, False, gain), text)
            self._room.set()

    def _rows(self, run_ids: list[str]) -> dict[str, RunRow]:
        return {row.run_id: row for row in self._store.runs(RunFilter(run_ids=tuple(run_ids)))}

    async def _tell(self, outcome: Outcome, text: str) -> None:
        if outcome.error is not None:
            await asyncio.to_thread(_bury, self._dead_letters, outcome.line, text, outcome)
        self._on_outcome(outcome)


async def _chunks(lines: Iterator[T]) -> AsyncIterator[list[T]]:
    """What an iterator gives without a wait, some at a time; it may wait for a pipe, so it has a thread of its own."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[T | Exception | None](_CHUNK)

    def put(it: T | Exception | None) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(it), loop).result()

    def read() -> None:
        with suppress(RuntimeError, CancelledError):  # nobody listens any more
            try:
                for line in lines:
                    put(line)
            except Exception as error:
                put(error)
            put(None)

    # A daemon: a pipe that stays silent must not keep the process.
    threading.Thread(target=read, name="emoloop-lines", daemon=True).start()
    ended = False
    while not ended:
        some: list[T] = []
        it = await queue.get()
        while it is not None and not isinstance(it, Exception):
            some.append(it)
            if len(some) == _CHUNK or queue.empty():
                break
            it = queue.get_nowait()
        ended = it is None
        if some:
            yield some
        if isinstance(it, Exception):
            raise it


def count_lines(source: Path) -> int:
    """How many lines `collect` will try. Errors as `read_lines`."""
    return sum(1 for _ in read_lines(source))


def read_lines(source: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file or a pipe that are not blank, with their numbers from 1.

    Raises:
        UserError: It cannot be read.
    """
    try:
        # Broken bytes become visible signs: one bad line must not end the others.
        with source.open(encoding="utf-8-sig", errors="replace") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error


def _clear(dead_letters: Path, source: Path) -> None:
    if dead_letters.exists() and dead_letters.samefile(source):
        raise UserError(f"{dead_letters} is the input: choose another file for what fails (--failed)")
    try:
        dead_letters.touch()
        dead_letters.unlink()
    except OSError as error:
        raise UserError(f"cannot write {dead_letters}: {error.strerror or error}") from error


def _bury(path: Path, number: int, text: str, outcome: Outcome) -> None:
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    letter: dict[str, Any] = given if isinstance(given, dict) else {"raw": text.rstrip("\n")}
    letter = {"line": number, **letter, "run_id": outcome.run_id, "error": outcome.error}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(letter, ensure_ascii=False) + "\n")
