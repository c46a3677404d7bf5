"""Addresses of servers: how they are read and shown, and what this machine's network settings mean for them.

Proxies and certificates of the environment are for other machines: no proxy leads to this one, and a broken
certificate file must not stop plain HTTP to it.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..domain import UserError
from ..settings import SECRETS


def redact(text: str) -> str:
    """A URL, or a text that holds some, with user names and passwords replaced by `***`."""
    return re.sub(r"(?<=://)[^/@\s]*(?:@[^/@\s]*)*@", "***@", text)


def public(settings: Any) -> Any:
    """Dumped settings as they may be written down: without secrets, and without passwords in addresses."""
    if isinstance(settings, dict):
        return {key: public(value) for key, value in settings.items() if key not in SECRETS}
    return redact(settings) if isinstance(settings, str) else settings


def base_urls(text: str, setting: str) -> list[str]:
    """The URLs of a setting that holds one, or several separated by commas; `http://` where no scheme is given.

    Raises:
        UserError: None, or something that is no URL.
    """
    urls = [part.strip().rstrip("/") for part in text.split(",") if part.strip()]
    urls = [url if "://" in url else f"http://{url}" for url in urls]
    for url in urls or [""]:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) > 0
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"{setting} {redact(text)!r}: give a URL such as http://127.0.0.1:8000/v1")
    return urls


def is_local(url: str) -> bool:
    """Whether the URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def client(url: str, key: str = "", **options: Any) -> httpx.AsyncClient:
    """A client for one server.

    Args:
        url: The server's.
        key: Bearer token; white space around it, such as a file's line end, is left out.
        **options: As for `httpx.AsyncClient`.

    Raises:
        UserError: The key cannot be sent, or the environment's proxies or certificates cannot be used.
    """
    key = key.strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"the API key for {redact(url)} holds a character that no HTTP header can carry")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        if is_local(url) and "transport" not in options:
            # A transport of one's own leaves the proxies out; certificates are for https alone.
            tls, limits = url.startswith("https:"), options.pop("limits", httpx.Limits())
            options["transport"] = httpx.AsyncHTTPTransport(trust_env=tls, verify=tls, limits=limits)
        return httpx.AsyncClient(headers=headers, follow_redirects=True, **options)
    except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
        raise UserError(
            f"no connection to {redact(url)} can be made: {redact(str(error))} (look at the environment's "
            "SSL_CERT_FILE, SSL_CERT_DIR and proxies)"
        ) from error


async def receive(
    client: httpx.AsyncClient, method: str, url: str, body: Any = None, most: int = 2**24
) -> httpx.Response:
    """A whole answer, unpacked.

    Args:
        client: Asks for it.
        method: "GET" or "POST".
        url: What is asked for.
        body: Sent as JSON.
        most: Bytes; a longer answer, also one that is short until it is unpacked, is not read to its end.

    Raises:
        httpx.HTTPError: No answer, or one that is too long or broken (`httpx.DecodingError`).
    """
    content = bytearray()
    async with client.stream(method, url, json=body) as response:
        async for part in response.aiter_bytes(65_536):
            content += part
            if len(content) > most:
                raise httpx.DecodingError(f"the answer is longer than {most} bytes", request=response.request)
    headers = {"retry-after": response.headers.get("retry-after", "")}
    return httpx.Response(
        response.status_code, headers=headers, content=bytes(content), request=response.request
    )
