"""Who may speak to this server.

With keys, a request carries one with the route's scope. Without, the server is bound to loopback and answers only to
local names: a web page must not reach it through DNS rebinding (a foreign Host) or from a browser (a foreign Origin; or
none, as browsers fetch images, which they tell by Sec-Fetch-Site). Under a name that `hosts` adds a proxy's callers
come, who may be anybody: they may ask models, and administer nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from aiohttp import web

from serverless_llm.errors import RequestError
from serverless_llm.gateway import page
from serverless_llm.gateway.keys import Key, digest
from serverless_llm.gateway.options import GatewayOptions

OPEN = ("/health", "/ready", "/openapi.json")
_ADMIN = "/admin/"
_UNKNOWN = "is neither loopback nor one of `hosts` in the server's configuration"
_KEYLESS = "/admin/ needs a key here: set `api_key` or `keys_file` in the server's configuration, or ask on loopback"
_INFERENCE = ("/v1/", "/models/")


class Access:
    """The keys of one gateway, which may be read anew while it serves."""

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        self._hosts = tuple(host.lower() for host in options.hosts)
        self._keys: dict[bytes, Key] = {}
        self.set_keys(options.keys)

    def set_keys(self, keys: Iterable[Key]) -> None:
        """From now on these keys count."""
        self._keys = {key.digest: key for key in keys}

    def check(self, request: web.Request) -> Key | None:
        """The key of a request that may pass; None where none is needed.

        Raises:
            RequestError: 401 without a valid key, 403 from a foreign place or without the scope.
        """
        path = request.path
        if path in OPEN or (self._keys and page.is_public(path)):
            return None
        given = request.headers.get("Authorization", "")
        if not self._keys or (path == "/metrics" and self._options.open_metrics and not given):
            _check_local(request.headers, self._hosts)
            if _scope(path) == "admin" and not _is_own(request.headers):
                raise RequestError(403, "permission_denied", _KEYLESS)
            return None
        key = self._key(given)
        scope = _scope(path)
        if scope and scope not in key.scopes:
            raise RequestError(403, "permission_denied", f"the key {key.id!r} does not have the scope {scope!r}")
        return key

    def _key(self, header: str) -> Key:
        scheme, _, text = header.partition(" ")
        given = text.strip().encode(errors="surrogateescape")  # as aiohttp decoded it
        # found by its digest: the time of a look-up says nothing about a key
        key = self._keys.get(digest(given)) if scheme.lower() == "bearer" else None
        if key is None:
            raise RequestError(401, "invalid_api_key", "a valid key is required: Authorization: Bearer ...")
        return key


def _scope(path: str) -> str:
    """The scope that a path needs; "": any key will do."""
    if path.startswith(_ADMIN):
        return "admin"
    return "inference" if path.startswith(_INFERENCE) else ""


def _check_local(headers: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    origin = headers.get("Origin")
    if not is_local(f"//{headers.get('Host', '')}", allowed):
        raise RequestError(403, "permission_denied", f"this Host {_UNKNOWN}")
    if origin is not None and not is_local(origin, allowed):
        raise RequestError(403, "permission_denied", f"this Origin {_UNKNOWN}")
    embedded = headers.get("Sec-Fetch-Site") == "cross-site" and headers.get("Sec-Fetch-Mode") != "navigate"
    if origin is None and embedded:
        raise RequestError(403, "permission_denied", "a page of another site may not embed what is here")


def _is_own(headers: Mapping[str, str]) -> bool:
    """Whether host and page are this machine's; a page under a further name may be anybody's."""
    return all(is_local(url, ()) for url in (f"//{headers['Host']}", headers.get("Origin", "//localhost")))


def is_local(url: str, allowed: tuple[str, ...]) -> bool:
    """Whether the URL's host is loopback or one of `allowed` (in lower case), whatever its port."""
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
