"""Who may speak to this server.

With keys, a request carries one. Without, the server is bound to loopback and answers only to local names: a web page
must not reach it through DNS rebinding (a foreign Host) or from a browser (a foreign Origin).
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from serverless_llm.errors import RequestError
from serverless_llm.gateway.options import GatewayOptions

OPEN = ("/health", "/ready")
AGENTS = "/agents/"  # agents show a token of their own to their own handler


def check(request: web.Request, options: GatewayOptions) -> None:
    """
    Raises:
        RequestError: 401 without a valid key, 403 from a foreign place.
    """
    path = request.path
    if path in OPEN or path.startswith(AGENTS):
        return
    if not options.api_keys:
        _check_local(request.headers.get("Host", ""), request.headers.get("Origin"), options.hosts)
    elif not (path == "/metrics" and options.open_metrics):
        _check_key(request.headers.get("Authorization", ""), options.api_keys)


def _check_key(header: str, keys: tuple[str, ...]) -> None:
    scheme, _, key = header.partition(" ")
    given = key.strip().encode(errors="surrogateescape")  # as aiohttp decoded it
    # every key is compared, so that the time says nothing
    known = [hmac.compare_digest(given, each.encode()) for each in keys]
    if scheme.lower() != "bearer" or not any(known):
        raise RequestError(401, "invalid_api_key", "a valid key is required: Authorization: Bearer ...")


def _check_local(host: str, origin: str | None, allowed: tuple[str, ...]) -> None:
    if not is_local(f"//{host}", allowed):
        raise RequestError(403, "permission_denied", "this Host is neither loopback nor configured")
    if origin is not None and not is_local(origin, allowed):
        raise RequestError(403, "permission_denied", "this Origin is neither loopback nor configured")


def is_local(url: str, allowed: tuple[str, ...]) -> bool:
    """Whether the URL's host is loopback or one of `allowed`, whatever its port."""
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return False
    if not name:
        return False
    if name == "localhost" or name in allowed:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
