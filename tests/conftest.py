"""What all tests share: `import tiny` works in every folder (pytest runs with --import-mode=importlib)."""

import os
import sys
from pathlib import Path

import pytest

# Before torch loads. One thread for each process: tests compare bits, run side by side and start children; idle
# threads that spin would take the cores from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LANES = ("serving", "faults", "browser", "packaging", "docs", "hosts")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """A folder named like a lane marks what it holds."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room in LANES:
            item.add_marker(room)


@pytest.fixture(scope="session")
def postgres():
    """URL of a PostgreSQL of our own; skipped where there is none."""
    from emoloop.evals.bench.postgres import missing, postgres

    if why := missing():
        pytest.skip(why)
    with postgres() as url:
        yield url
