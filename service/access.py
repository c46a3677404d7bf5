"""Who may ask, and what every answer carries: one ASGI layer around the application.

Nothing is needed on the machine itself. From elsewhere a bearer token is, or a reverse proxy that was declared. A page
of another site can neither post here (its Origin is not ours) nor read (its Host is not ours, were it to point a name
of its own at this server).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import time
from collections import Counter
from http.cookies import SimpleCookie
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..domain import UserError
from ..settings import ServiceSettings
from .problems import answer, for_browser

#: The page's session, for a browser that cannot send a header.
COOKIE = "emoloop"

#: What is shown to everybody: whether the server lives, and what the login page needs.
_OPEN = ("/healthz", "/readyz", "/login", "/static/")

#: Seconds that a body's next piece may take.
_BODY = 30.0

#: Clients whose requests are counted.
_REMEMBERED = 10_000

#: What a refusal says beside its status.
_TOLD = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}

_SAFE = ("GET", "HEAD", "OPTIONS")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def check(settings: ServiceSettings) -> None:
    """Refuse to listen where everybody could come in.

    Raises:
        UserError: The address is not this machine's own, and neither a token nor a proxy guards it.
    """
    if not (_is_loopback(settings.host) or settings.token or settings.behind_proxy):
        raise UserError(
            f"service.host {settings.host} is open to other machines: set EMOLOOP_SERVICE__TOKEN, or say "
            "--behind-proxy where a reverse proxy decides who comes in"
        )


def session(token: str) -> str:
    """The cookie's value: it lets a browser in and does not tell the token."""
    return hmac.new(token.encode(), b"emoloop session", hashlib.sha256).hexdigest()


class Access:
    """The layer.

    Args:
        app: What is behind it.
        settings: Those of the service.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self.app = app
        self._settings = settings
        named = (name.strip().lower() for name in settings.hosts.split(","))
        own = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), settings.host.lower()}
        self._clients = _Clients(settings)
        self._hosts = own | {name for name in named if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        refusal = self._refusal(request) or self._clients.enter(request)
        if refusal is None:
            try:
                await self.app(scope, self._bounded(request, receive), guarded)
            finally:
                self._clients.leave(request)
        elif refusal[0] == 401 and for_browser(request):
            await RedirectResponse("/login", 303)(scope, receive, guarded)
        else:
            await answer(request, *refusal, _TOLD.get(refusal[0]))(scope, receive, guarded)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        headers, settings = request.headers, self._settings
        if not self._known(headers.get("host", "")):
            return 421, "this server does not go by that name: service.hosts names those it goes by"
        if request.method not in _SAFE and not _same_origin(headers):
            return 403, "the request comes from a page of another site"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > settings.body_bytes:
            return 413, f"a body has {settings.body_bytes} bytes at most"
        if (
            settings.token
            and not request.url.path.startswith(_OPEN)
            and not self._let_in(headers, settings.token)
        ):
            return 401, "this server wants its token: Authorization: Bearer …"
        return None

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        # An address cannot be pointed elsewhere, as a name can.
        return name in self._hosts or _is_address(name)

    def _let_in(self, headers: Headers, token: str) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return True
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), session(token).encode())

    def _bounded(self, request: Request, receive: Receive) -> Receive:
        """What is received, up to the limit, whatever the header said; a body that does not come is not waited for."""
        received, whole = 0, False

        async def bounded() -> Message:
            nonlocal received, whole
            try:
                async with asyncio.timeout(None if whole else _BODY):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "the request's body did not come") from error
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._settings.body_bytes:
                raise HTTPException(413, f"a body has {self._settings.body_bytes} bytes at most")
            return message

        return bounded


class _Clients:
    """What each client from elsewhere asks: so many answers at a time, so many requests a minute."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._rate, self._most = settings.client_requests, settings.client_answers
        self._open: Counter[str] = Counter()
        # How many requests each may make now, and of when that is; the one that asked last is last.
        self._left: dict[str, tuple[float, float]] = {}

    def enter(self, request: Request) -> tuple[int, str] | None:
        """Why a request is refused; None where it is let in, and `leave` is to be called."""
        host = self._host(request)
        if self._most and self._open[host] >= self._most:
            return (
                429,
                f"{self._most} requests of yours are being answered: service.client_answers allows no more",
            )
        if self._rate and host:
            now = time.monotonic()
            left, then = self._left.pop(host, (float(self._rate), now))
            left = min(self._rate, left + (now - then) * self._rate / 60)
            self._left[host] = max(left - 1, 0.0), now
            if len(self._left) > _REMEMBERED:
                del self._left[next(iter(self._left))]
            if left < 1:
                return 429, f"service.client_requests allows {self._rate} requests a minute"
        if host:
            self._open[host] += 1
        return None

    def leave(self, request: Request) -> None:
        """A request is answered."""
        if host := self._host(request):
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]

    def _host(self, request: Request) -> str:
        """The client; nothing for this machine's own."""
        host = request.client.host if request.client else ""
        return "" if _is_loopback(host) else host


def _same_origin(headers: Headers) -> bool:
    """Whether a request that changes something comes from our own page, or from no browser."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)
