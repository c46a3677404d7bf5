"""A PostgreSQL of one's own for benchmarks and tests: on a socket in a temporary folder, gone with the block."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec


def missing() -> str | None:
    """Why no server can be started here; None where one can."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed"
    if _programs() is None:
        return "needs PostgreSQL's server programs"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "PostgreSQL does not run as root"
    return None


class Server:
    """A server whose data lie in a folder; it runs between `start` and `stop`.

    Args:
        folder: For data, socket and log.
        durable: Whether a commit is synced, as a real server's is.
    """

    def __init__(self, folder: str, durable: bool = False) -> None:
        # The server refuses to run as root; there it runs as the user that its package made, who may not enter every
        # folder.
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._sync = "on" if durable else "off"
        self._folder, self.url = folder, f"postgresql://tester@/postgres?host={folder}"
        if self._as:
            shutil.chown(folder, "postgres")
        self._run("initdb", "-U", "tester", "--auth=trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-k {self._folder} -c listen_addresses='' -c fsync={self._sync}"
        self._run("pg_ctl", "-w", "-o", options, "-l", f"{self._folder}/log", "start")

    def stop(self) -> None:
        """Stop it as a crash would: at once, and connections are cut."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as, f"{_programs()}/{program}", "-D", f"{self._folder}/data", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder)


@contextmanager
def server(durable: bool = False) -> Generator[Server]:
    """A server that runs. Only where nothing is `missing`."""
    with tempfile.TemporaryDirectory(prefix="emoloop-postgres-") as folder:
        made = Server(folder, durable)
        made.start()
        try:
            yield made
        finally:
            made.stop()


def wanted(database: str) -> bool:
    """Whether `postgres`, `sqlite` or `auto` means a server; `auto` does where its programs are."""
    return database == "postgres" or (database == "auto" and missing() is None)


@contextmanager
def postgres() -> Generator[str]:
    """The URL of a `server`."""
    with server() as made:
        yield made.url


def _programs() -> str | None:
    # Debian keeps them off the PATH.
    found = shutil.which("initdb") or max(glob.glob("/usr/lib/postgresql/*/bin/initdb"), default=None)
    return found and os.path.dirname(found)
