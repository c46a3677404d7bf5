"""What all tests share: `import tiny` works in every folder (pytest runs with --import-mode=importlib)."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
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
    """URL of a PostgreSQL of our own, on a socket in a temporary folder; skipped where there is none."""
    pytest.importorskip("psycopg")
    # Debian keeps them off the PATH.
    found = shutil.which("initdb") or max(glob.glob("/usr/lib/postgresql/*/bin/initdb"), default=None)
    if found is None:
        pytest.skip("needs PostgreSQL's server programs")
    programs = os.path.dirname(found)
    # The server refuses to run as root; there it runs as the user that its package made, who may not enter
    # pytest's folders.
    as_user: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root")
        as_user = ["runuser", "-u", "postgres", "--"]
    with tempfile.TemporaryDirectory(prefix="emoloop-postgres-") as folder:
        if as_user:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"

        def run(*command):
            subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

        run(f"{programs}/initdb", "-D", data, "-U", "tester", "--auth=trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(f"{programs}/pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{folder}/log", "start")
        yield f"postgresql://tester@/postgres?host={folder}"
        run(f"{programs}/pg_ctl", "-D", data, "-m", "immediate", "stop")
