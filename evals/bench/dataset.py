"""A hundred thousand logged runs: statistics of the dataset and its first batch, in time and memory.

The log is filled by bulk inserts of events, because recording them one by one would be another benchmark; the store
then derives its tables from them. The measurement runs in a fresh process, so that peak memory is its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

_CHUNK = 2000


def main(
    runs: int = 100_000, rounds: int = 2, images: int = 2, phrases: int = 24, home: str = ""
) -> dict[str, Any]:
    """Dataset statistics and first batch of a large log.

    Args:
        runs: Logged runs.
        rounds: Rounds of each.
        images: Images a round.
        phrases: As `data.phrases`; 0 leaves them out.
        home: Folder for the log, kept; empty is a temporary one.

    Returns:
        The document with `figures`: runs, seconds, peak_mb.
    """
    folder = Path(home) if home else Path(tempfile.mkdtemp(prefix="emoloop-bench-"))
    try:
        start = time.perf_counter()
        if not (folder / "events.db").exists():
            _fill(folder, runs, rounds, images)
        filled = time.perf_counter() - start
        code = f"from {__name__} import measure; import sys; measure(sys.argv[1], int(sys.argv[2]))"
        answer = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(phrases)],
            capture_output=True,
            text=True,
            check=True,
        )
        measured = json.loads(answer.stdout)
        size = sum(path.stat().st_size for path in folder.glob("events.db*"))
    finally:
        if not home:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "figures": {**measured, "log_mb": size / 2**20, "fill_seconds": filled},
        "settings": {"runs": runs, "rounds": rounds, "images": images, "phrases": phrases},
        "n": runs,
        "seeds": [0],
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def measure(home: str, phrases: int) -> None:
    """Open the log, take statistics and a batch of every source, print what it took as JSON."""
    import resource

    from ...rl.config import DataConfig
    from ...rl.data.dataset import Dataset
    from ...rl.data.examples import SOURCES
    from ...rl.rollouts import LogRollouts
    from ...settings import load_settings
    from ...traces.store import open_store

    start = time.perf_counter()
    with open_store(load_settings({"home": home}), read_only=True) as store:
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
        "seconds": ended - start,
        "statistics_seconds": counted - start,
        "first_batch_seconds": ended - counted,
        # Kilobytes on Linux, bytes on macOS.
        "peak_mb": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }
    print(json.dumps(document))


def _fill(folder: Path, runs: int, rounds: int, images: int) -> None:
    from sqlalchemy import create_engine, insert

    from ...settings import load_settings
    from ...traces import schema
    from ...traces.migrate import row_of
    from ...traces.store import open_store

    folder.mkdir(parents=True, exist_ok=True)
    with open_store(load_settings({"home": str(folder)})) as store:
        engine = create_engine(f"sqlite:///{folder / 'events.db'}")
        for first in range(0, runs, _CHUNK):
            rows = [
                row_of(event.model_copy(update={"seq": seq}))
                for number in range(first, min(first + _CHUNK, runs))
                for seq, event in enumerate(_events(number, rounds, images))
            ]
            with engine.begin() as connection:
                connection.execute(insert(schema.events), rows)
        engine.dispose()
        store.rebuild()


def _reward(number: int, round_: int, index: int) -> float:
    return round(((number * 7919 + round_ * 104729 + index * 1299709) % 1000) / 1000 - 0.3 + 0.4 * round_, 3)


_START = datetime(2026, 1, 1, tzinfo=UTC)
_PROMPTS = 5000


def _events(number: int, rounds: int, images: int) -> Iterator[Any]:
    """The events of one run, as the graph would record them."""
    from ...domain import Critique, EmotionTarget, RunStatus, StopReason
    from ...events import Critiqued, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted

    run_id, time_ = _run_id(number), _START + timedelta(seconds=number)
    neutral = _prompt(number)
    target = EmotionTarget(valence=_valence(number), arousal=_arousal(number))
    yield RunStarted(run_id=run_id, time=time_, prompt=neutral, target=target, seed=number)
    for round_ in range(rounds):
        prompt = _prompt(number, round_)
        if round_:
            yield Rewritten(
                run_id=run_id, time=time_, round=round_, prompt=prompt, changes="brighter", why="too dull",
                model="miniature", prompt_version="rewriter-compact@1",
            )  # fmt: skip
        for index in range(images):
            at: dict[str, Any] = {"run_id": run_id, "time": time_, "round": round_, "index": index}
            sha = _sha(number, round_, index)
            yield ImageGenerated(
                **at, sha256=sha, prompt=prompt, seed=number * 100 + round_ * 10 + index, model="miniature",
                revision="r" * 64, steps=14, guidance=3.0, height=96, width=96,
                versions={"torch": "2.13.0", "diffusers": "0.42.1"}, seconds=0.2,
            )  # fmt: skip
            critique = Critique(
                analysis="a dog by the sea under a grey sky, nobody around, muted colours",
                **_read(number, round_), alignment=0.9, suggestion="a brighter sky",
            )  # fmt: skip
            yield Critiqued(
                **at, sha256=sha, critique=critique, model="miniature", prompt_version="critic-compact@1",
                usage={"input_tokens": 90, "output_tokens": 60}, seconds=0.1,
            )  # fmt: skip
            yield Rewarded(
                **at, sha256=sha, name="emotion", version="1", value=_reward(number, round_, index)
            )
    yield RunFinished(
        run_id=run_id,
        time=time_,
        round=rounds - 1,
        status=RunStatus.COMPLETED,
        stop_reason=StopReason.ROUNDS_USED,
    )


def _run_id(number: int) -> str:
    return f"bench-{number:09d}"


def _prompt(number: int, round_: int = 0) -> str:
    neutral = f"a thing of kind {number % _PROMPTS} by the sea"
    # As many moods as there are targets, in words that no neutral prompt uses.
    return f"{neutral}, in mood m{number % 77}, take t{round_}" if round_ else neutral


def _read(number: int, round_: int) -> dict[str, Any]:
    """What the critic reads: nothing of the wish before the first rewrite, nearly all of it after."""
    share = 0.9 if round_ else 0.0
    return {"valence": round(share * _valence(number), 2), "arousal": round(share * _arousal(number), 2)}


def _sha(number: int, round_: int, index: int) -> str:
    return f"{number * 10_000 + round_ * 100 + index:064x}"


def _valence(number: int) -> float:
    return round(-2.5 + (number % 11) * 0.5, 1)


def _arousal(number: int) -> float:
    return round(2.5 - (number % 7) * 0.7, 1)
