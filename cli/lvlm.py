"""`emoloop lvlm serve` and `emoloop lvlm install`. Only typer loads before a verb runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from ..domain import UserError
from ..tools.vllm import install as vllm_install

if TYPE_CHECKING:
    from ..tools.vllm.server import VLLMServer

app = typer.Typer(help="The local vLLM server behind critic and rewriter.", no_args_is_help=True)

#: Seconds between two looks at the cache's hit rate, which is shown when it has changed.
_EVERY = 30.0

#: How often in a row a server is started again, after how many seconds for the first time (twice as many each time, up
#: to a minute), and seconds after which a server has run well.
_RESTARTS, _FIRST, _WELL = 6, 1.0, 300.0

#: Which lines of the log are shown.
_TELLING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b").search


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A preset, a folder or a hub id.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="0 takes a free one.  [default: lvlm.base_url's]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    context_length: Annotated[
        int | None, typer.Option("--context", min=256, help="Tokens of prompt and answer.")
    ] = None,
    seats: Annotated[int, typer.Option(min=1, help="Requests in one batch at most.")] = 32,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share one copy of the model.")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait until it is ready.")] = 900.0,
    log: Annotated[Path | None, typer.Option(help="What vLLM prints.  [default: vllm.log in home]")] = None,
) -> None:
    """Run vLLM with the flags that suit emoloop until Ctrl-C, and start it again when it ends by itself.

    Flags that are not listed go to vLLM. Its warnings and errors are shown, all that it prints is in its log.
    """
    from ..settings import load_settings
    from ..tools.vllm.server import VLLMServer, find_python

    settings = load_settings()
    server = VLLMServer(
        model or settings.lvlm.model,
        python=find_python(settings.lvlm.vllm_python),
        host=host,
        port=_port(settings.lvlm.base_url) if port is None else port,
        device=device or settings.lvlm.device,
        log=log or settings.home / "vllm.log",
        dtype=dtype or settings.lvlm.dtype,
        context=context_length,
        seats=seats,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        extra=context.args,
    )
    # Both signals unwind through the code below, which lets go of the child on every path.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with _Line() as line:
            server.start(timeout, line)
        print(server.url, flush=True)
        _say(f"serving {server.names[0]}; log: {server.log}")
        _say(f"use it:  EMOLOOP_LVLM__BASE_URL={server.url} emoloop run … --lvlm vllm")
        _say("stop it with Ctrl-C")
        _supervise(server, timeout)
    except KeyboardInterrupt:
        _say("stopping vLLM")
    finally:
        server.stop()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def install(context: typer.Context) -> None:
    """Make vLLM's own environment for the CPU (2.5 GB, a few minutes) and print its interpreter.

    Options that are not listed go to pip, such as --find-links FOLDER.
    """
    vllm_install.main(context.args)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _port(base_url: str) -> int:
    from urllib.parse import urlsplit

    from ..tools.urls import base_urls

    return urlsplit(base_urls(base_url, "lvlm.base_url")[0]).port or 8000


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _supervise(server: VLLMServer, timeout: float) -> NoReturn:
    """Watch a server that runs, and start it again when it has ended."""
    ended, up = 0, True
    with server.log.open(encoding="utf-8", errors="replace") as log:
        log.seek(0, os.SEEK_END)
        while True:
            if up:
                began = time.monotonic()
                code = _watch(server, log)
                ended = 0 if time.monotonic() - began > _WELL else ended
                _say(
                    f"emoloop: vLLM ended by itself with exit code {code}: {server.reason()} (see {server.log})"
                )
            if ended >= _RESTARTS:
                _say(f"emoloop: vLLM ended {ended + 1} times in a row")
                raise typer.Exit(1)
            pause = min(_FIRST * 2**ended, 60.0)
            ended += 1
            _say(f"starting it again in {pause:g} s")
            time.sleep(pause)
            try:
                with _Line() as line:
                    server.start(timeout, line)
                _say(f"serving {server.names[0]} again at {server.url}")
                up = True
            except UserError as error:
                _say(f"emoloop: {error}")
                up = False


def _watch(server: VLLMServer, log: TextIO) -> int:
    """Wait for the server's end; pass its warnings and errors on, and how much came out of the prefix cache."""
    import httpx

    from ..tools.vllm.server import metrics, prefix_hits

    before: dict[str, float] = {}
    looked = time.monotonic()
    while True:
        try:
            return server.wait(1.0)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for line in filter(_TELLING, log):
                _say(line.rstrip())
        if time.monotonic() - looked < _EVERY:
            continue
        looked = time.monotonic()
        with suppress(httpx.HTTPError):
            now = metrics(server.url)
            hits, asked = prefix_hits(now, before)
            if asked:
                _say(f"prefix cache: {hits / asked:.0%} of {asked:.0f} prompt tokens")
            before = now


class _Line:
    """One line on stderr that changes in place on a terminal; elsewhere, a line when its news are new."""

    def __enter__(self) -> _Line:
        self._terminal = sys.stderr.isatty()
        self._last = ""
        return self

    def __call__(self, text: str) -> None:
        if self._terminal:
            print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
        elif (news := text.split(" s: ", 1)[-1]) != self._last:
            self._last = news
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
