"""`emoloop serve`: the HTTP service. Only typer loads before it runs."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..domain import UserError
from . import options as opt

if TYPE_CHECKING:
    from ..settings import ServiceSettings


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.  [default: 8765]")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A reverse proxy in front says who comes in.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models/--no-models", help="Load models and run what is asked, or only show.")
    ] = True,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    lvlm: opt.Lvlm = None,
    home: opt.Home = None,
    set_: opt.Set = None,
) -> None:
    """Serve the API and the pages that show the log.

    This machine needs nothing to come in. Another address needs EMOLOOP_SERVICE__TOKEN, or a proxy in front.
    """
    try:
        import uvicorn

        from ..service.server import config_of
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("emoloop"):
            raise
        raise UserError(f"`emoloop serve` needs {error.name}: pip install 'emoloop[serve]'") from error
    from ..service.access import check
    from ..service.work import Service
    from ..settings import load_settings, merged

    given = {"host": host, "port": port, "behind_proxy": behind_proxy or None}
    service = {"service": {key: value for key, value in given.items() if value is not None}}
    settings = load_settings(merged(opt.overrides(context.params), service))
    check(settings.service)
    logging.basicConfig(level=logging.WARNING, format="emoloop: %(message)s")
    server = uvicorn.Server(config_of(Service(settings, models=models)))
    _tell(server, settings.service)
    server.run()
    if not server.started:
        raise typer.Exit(1)


def _tell(server: object, settings: ServiceSettings) -> None:
    """Have the server print its address once it listens: with port 0 nobody knows it before."""
    startup = server.startup  # pyright: ignore[reportAttributeAccessIssue]

    async def told(*args: object, **keywords: object) -> None:
        await startup(*args, **keywords)
        if server.started:  # pyright: ignore[reportAttributeAccessIssue]
            port = server.servers[0].sockets[0].getsockname()[1]  # pyright: ignore[reportAttributeAccessIssue]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(f"http://{host}:{port}", flush=True)
            print("stop it with Ctrl-C", file=sys.stderr, flush=True)

    server.startup = told  # pyright: ignore[reportAttributeAccessIssue]
