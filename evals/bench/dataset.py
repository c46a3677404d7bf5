"""A hundred thousand logged runs: statistics of the dataset and its first batch, in time and memory.

The log is filled in large commits. The measurement runs in a fresh process, so that peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ...domain import Critique, EmotionTarget, RunStatus, StopReason
from ...events import Critiqued, Event, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from ...rl.config import DataConfig
from ...rl.data.dataset import Dataset
from ...rl.data.examples import SOURCES
from ...rl.rollouts import LogRollouts
from ...settings import load_settings
from ...traces.rows import RunFilter
from ...traces.store import open_store
from .postgres import postgres

#: Runs in one commit.
_CHUNK = 200

_START = datetime(2026, 1, 1, tzinfo=UTC)
_PROMPTS = 5000


def main(
    runs: int = 100_000,
    rounds: int = 2,
    images: int = 2,
    phrases: int = 24,
    home: str = "",
    database: str = "sqlite",
) -> dict[str, Any]:
    """First page of a large log, its dataset's statistics and first batch.

    Args:
        runs: Logged runs.
        rounds: Rounds of each.
        images: Images a round.
        phrases: As `data.phrases`; 0 leaves them out.
        home: Folder for the log, kept; empty is a temporary one.
        database: `sqlite`, or `postgres`: a server of its own.

    Returns:
        The document with `figures`: runs, seconds, peak_mb.
    """
    with ExitStack() as stack:
        spare = stack.enter_context(tempfile.TemporaryDirectory(prefix="emoloop-bench-"))
        url = stack.enter_context(postgres()) if database == "postgres" else None
        folder = Path(home or spare)
        given = {"home": str(folder), "traces": {"database_url": url}}
        start = time.perf_counter()
        if url or not (folder / "events.db").exists():
            with open_store(load_settings(given)) as store:
                for first in range(0, runs, _CHUNK):
                    numbers = range(first, min(first + _CHUNK, runs))
                    store.append_all([list(_events(number, rounds, images)) for number in numbers])
        filled = time.perf_counter() - start
        code = f"from {__name__} import measure; import sys; measure(sys.argv[1], int(sys.argv[2]))"
        command = [sys.executable, "-c", code, json.dumps(given), str(phrases)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        size = sum(path.stat().st_size for path in folder.glob("events.db*"))
    figures = {**json.loads(answer.stdout), "log_mb": size / 2**20, "fill_seconds": filled}
    return {"figures": figures, "n": runs}


def measure(given: str, phrases: int) -> None:
    """Open the log, list its newest runs, take statistics and a batch of every source, print what it took as JSON."""
    import resource  # Windows has no such module

    with open_store(load_settings(json.loads(given)), read_only=True) as store:
        start = time.perf_counter()
        assert list(store.runs(RunFilter(limit=20)))
        listed = time.perf_counter() - start
        start = time.perf_counter()
        dataset = Dataset(LogRollouts(store), DataConfig(phrases=phrases))
        counted = time.perf_counter()
        for source in SOURCES if phrases else SOURCES.keys() - {"phrases"}:
            examples = dataset.examples(source)
            batch = examples.fetch(range(0, len(examples), max(1, len(examples) // 16)))
            assert batch and all(example.prompt for example in batch)
        ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    document = {
        "runs": dataset.statistics.runs,
        "pairs": dataset.statistics.sources["pairs"]["train"],
        "first_page_ms": 1000 * listed,
        "seconds": ended - start,
        "statistics_seconds": counted - start,
        "first_batch_seconds": ended - counted,
        # Kilobytes on Linux, bytes on macOS.
        "peak_mb": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }
    print(json.dumps(document))


def _events(number: int, rounds: int, images: int) -> Iterator[Event]:
    """The events of one run, as the graph would record them."""
    run: dict[str, Any] = {"run_id": f"bench-{number:09d}", "time": _START + timedelta(seconds=number)}
    valence, arousal = round(-2.5 + (number % 11) * 0.5, 1), round(2.5 - (number % 7) * 0.7, 1)
    prompt = f"a thing of kind {number % _PROMPTS} by the sea"
    target = EmotionTarget(valence=valence, arousal=arousal)
    yield RunStarted(**run, prompt=prompt, target=target, seed=number)
    for round_ in range(rounds):
        # What the critic reads: nothing of the target before the first rewrite, nearly all of it after.
        share = 0.9 if round_ else 0.0
        if round_:
            # As many moods as there are targets, in words that no neutral prompt uses.
            prompt = f"a thing of kind {number % _PROMPTS} by the sea, in mood m{number % 77}, take t{round_}"
            yield Rewritten(
                **run, round=round_, prompt=prompt, changes="brighter", why="too dull",
                model="miniature", prompt_version="rewriter-compact@1",
            )  # fmt: skip
        for index in range(images):
            image = {**run, "round": round_, "index": index}
            image["sha256"] = f"{number * 10_000 + round_ * 100 + index:064x}"
            yield ImageGenerated(
                **image, prompt=prompt, seed=number * 100 + round_ * 10 + index, model="miniature",
                revision="r" * 64, steps=14, guidance=3.0, height=96, width=96,
                versions={"torch": "2.13.0", "diffusers": "0.42.1"}, seconds=0.2,
            )  # fmt: skip
            critique = Critique(
                analysis="a dog by the sea under a grey sky, nobody around, muted colours",
                valence=round(share * valence, 2), arousal=round(share * arousal, 2), alignment=0.9,
                suggestion="a brighter sky",
            )  # fmt: skip
            yield Critiqued(
                **image, critique=critique, model="miniature", prompt_version="critic-compact@1",
                usage={"input_tokens": 90, "output_tokens": 60}, seconds=0.1,
            )  # fmt: skip
            noise = (number * 7919 + round_ * 104729 + index * 1299709) % 1000 / 1000
            yield Rewarded(**image, name="emotion", version="1", value=round(noise - 0.3 + 0.4 * round_, 3))
    yield RunFinished(**run, round=rounds - 1, status=RunStatus.COMPLETED, stop_reason=StopReason.ROUNDS_USED)
