"""Many runs from a file of prompts: concurrent, in bounded memory, exactly resumable.

A line's run is named by what the line says, where it stands and what the loop is made of, so the same command
goes on where it broke off, tries again what failed, and never takes another model's run for its own. What
cannot be run goes to a dead-letter file with its reason, in the form that `collect` reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..agents.ask import one_line
from ..domain import EmotionTarget, RunResult, RunStatus, UserError, read_target
from ..events import RunFinished
from ..traces.database import StoreError
from .loop import Loop
from .state import candidate_seed, read_prompt, read_seed

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
    """Run every line of a file.

    Args:
        loop: An open loop.
        source: JSON lines; blank ones are skipped.
        dead_letters: Where lines go that have no complete run; written anew, absent where there are none.
        seed: Lines without a seed get one from this and their number.
        concurrency: Runs at a time; they share the models, and their requests share batches.
        on_outcome: Called for each line when it is done.

    Raises:
        UserError: The dead-letter file would overwrite the source, or cannot be written.
        StoreError: The log is lost; all runs stop.
        OSError: The dead-letter file cannot be written any more; all runs stop.
    """
    await asyncio.to_thread(_clear, dead_letters, source)
    print_ = fingerprint(loop, seed)
    lines = _lines(source)
    one_writer = asyncio.Lock()

    async def worker() -> None:
        # Workers take the next line when they are free, so the file is never in memory.
        for number, text in lines:
            outcome = await _one(loop, number, text, print_, seed)
            if outcome.error is not None:
                async with one_writer:
                    await asyncio.to_thread(_bury, dead_letters, number, text, outcome)
            on_outcome(outcome)

    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def count_lines(source: Path) -> int:
    """How many lines `collect` will try.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return sum(1 for _ in _lines(source))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    # Broken bytes become visible signs: one bad line must not end the others.
    with source.open(encoding="utf-8-sig", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text


async def _one(loop: Loop, number: int, text: str, print_: str, seed: int) -> Outcome:
    run_id: str | None = None
    try:
        request = read_line(number, text)
        run_id = run_id_of(request, print_)
        before = await loop.recorder.events(run_id)
        known = any(isinstance(it, RunFinished) and it.status is RunStatus.COMPLETED for it in before)
        own = candidate_seed(seed, 0, request.line) if request.seed is None else request.seed
        result = await loop.run(
            request.prompt,
            request.target,
            seed=own,
            run_id=run_id,
            review=False,  # nobody is there to answer
            **request.options,
        )
        # The log has everything; a saved state of each run would only fill the disk.
        await loop.forget(run_id)
    except StoreError:
        raise
    except UserError as error:
        return Outcome(number, run_id, str(error))
    except Exception as error:
        return Outcome(number, run_id, one_line(error))
    return _outcome(number, result, known)


def _outcome(number: int, result: RunResult, known: bool) -> Outcome:
    images = sum(len(round.candidates) for round in result.rounds)
    error = None
    if result.status is not RunStatus.COMPLETED:
        error = result.warnings[-1] if result.warnings else f"{result.status.value}: {result.stop_reason}"
    return Outcome(number, result.run_id, error, images, known, result.gain)


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
