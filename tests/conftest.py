"""What all tests share: `import tiny` works in every folder (pytest runs with --import-mode=importlib)."""

import os
import sys
from pathlib import Path

# Before torch loads. One thread for each process: tests compare bits, run side by side and start children; idle
# threads that spin would take the cores from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LANES = ("serving", "faults", "browser", "packaging", "docs")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """A folder named like a lane marks what it holds."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room in LANES:
            item.add_marker(room)
