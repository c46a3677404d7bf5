"""How long a person waits: for the import, for `--help`, and for the first picture of a run with the settings' models.

Each figure is the median wall-clock time of whole processes, so that nothing is warm but the disk's cache.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...domain import Failure

_RUN = ("-m", "emoloop", "run", "a dog", "--valence", "2", "--arousal", "1", "--seed", "0")


def main(runs: int = 3, timeout: float = 300.0) -> dict[str, Any]:
    """Seconds to import the package, to print the help, and to the first image that a run has stored.

    Args:
        runs: Processes of each kind; their median counts.
        timeout: Seconds after which the first image is given up.

    Raises:
        Failure: A process failed or took too long.
    """
    figures = {
        "import_seconds": _median(runs, lambda: _finish("-c", "import emoloop")),
        "help_seconds": _median(runs, lambda: _finish("-m", "emoloop", "--help")),
        "first_image_seconds": _median(runs, lambda: _first_image(timeout)),
    }
    return {"figures": figures, "n": runs}


def _median(runs: int, once: Callable[[], None]) -> float:
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _finish(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(words)}: {done.stderr.strip()}")


def _first_image(timeout: float) -> None:
    ends = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="emoloop-startup-") as home:
        words = [sys.executable, *_RUN, "--home", home, "--out", f"{home}/out"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            try:
                while not any(Path(home).glob("blobs/*/*.png")):
                    if child.poll() is not None or time.monotonic() > ends:
                        child.kill()
                        raise Failure(f"no image came: {(child.communicate()[1] or '').strip()[-300:]}")
                    time.sleep(0.005)
            finally:
                child.kill()
