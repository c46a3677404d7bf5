"""Looks like vLLM's server from outside: the same command line, a log, `/health` and the chat API.

    fake_python(tmp_path)          an "interpreter" whose `-m vllm…` runs it; everything else it does as Python

`FAKE_VLLM_LIVES` names a file with how many more servers fail: each takes one off and ends after it was healthy.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


def fake_python(folder: Path, body: str = f'exec {sys.executable} {__file__} "$@"') -> Path:
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then\n{body}\nfi\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def main() -> None:
    from fake_openai import FakeOpenAI

    words = sys.argv
    named = words.index("--served-model-name") + 1
    names = [word for word in words[named : words.index("--host")] if not word.startswith("--")]
    server = FakeOpenAI(int(words[words.index("--port") + 1]), models=tuple(names))
    print("(APIServer pid=1) INFO 11-21 16:32:06 [api.py:54] serving", flush=True)
    lives = Path(os.environ.get("FAKE_VLLM_LIVES", os.devnull))
    left = int(lives.read_text() or 0)
    if left:

        def end() -> None:
            lives.write_text(str(left - 1))
            print(
                "(EngineCore pid=7) ERROR 11-21 16:32:06 [core.py:54] ValueError: the engine is dead",
                flush=True,
            )
            os._exit(3)

        server.on_health = threading.Timer(0.3, end).start
    server.serve_forever()


if __name__ == "__main__":
    main()
