"""What all tests share: `import tiny` works in every folder (pytest runs with --import-mode=importlib)."""

import glob
import os
import shutil
import subprocess
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
def postgres(tmp_path_factory):
    """URL of a PostgreSQL of our own, on a socket in a temporary folder; skipped where there is none."""
    pytest.importorskip("psycopg")
    # Debian keeps them off the PATH.
    found = shutil.which("initdb") or max(glob.glob("/usr/lib/postgresql/*/bin/initdb"), default=None)
    if found is None:
        pytest.skip("needs PostgreSQL's server programs")
    programs = os.path.dirname(found)
    folder = tmp_path_factory.mktemp("postgres")
    # The server refuses to run as root; there it runs as the user that its package made.
    as_user: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in (folder.parent, folder.parent.parent):
            parent.chmod(0o711)
    data = folder / "data"

    def run(*command):
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run(f"{programs}/initdb", "-D", str(data), "-U", "tester", "--auth=trust", "-E", "UTF8", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run(f"{programs}/pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    yield f"postgresql://tester@/postgres?host={folder}"
    run(f"{programs}/pg_ctl", "-D", str(data), "-m", "immediate", "stop")
