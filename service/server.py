"""The ASGI server as the service runs it: uvicorn, and a connection that is given up when its request does not come."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .work import Service

#: Seconds that open connections get when the server stops, an idle one is kept, and a request's head may take.
_GRACE, _IDLE, HEAD = 3, 15, 10.0

#: Connections at a time; a further one is told to come again.
_CONNECTIONS = 2000


class Impatient(H11Protocol):
    """Closes a connection on which the head of a request does not get whole: uvicorn itself waits without end."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """See whether that was the rest of a head."""
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        super().connection_lost(exc)
        self._stop()

    def _look(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD, self._give_up)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def config_of(service: Service) -> uvicorn.Config:
    """How uvicorn serves a service: address and proxy as its settings say."""
    settings = service.settings.service
    return uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        http=Impatient,
        log_level="warning",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=_IDLE,
        # Whose word about the client is taken: the declared proxy's, and nobody's else.
        proxy_headers=settings.behind_proxy,
        server_header=False,
    )
