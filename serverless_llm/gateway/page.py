"""The dashboard's files: plain HTML, CSS and ES modules, served as they are, beside the API that they call.

They hold nothing secret and need no key; what they show they ask of `/admin`, with the key that the operator gives.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aiohttp import ETag, web

FOLDER = Path(__file__).parent / "dashboard"
PREFIX = "/dashboard/"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".md": "text/plain",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked about each time: a new version is seen at once
}


@dataclass(frozen=True, slots=True)
class File:
    body: bytes
    kind: str
    tag: str


@cache
def files() -> dict[str, File]:
    """Every file by its path below the folder, read once."""
    found = {}
    for path in sorted(FOLDER.rglob("*.*")):
        body = path.read_bytes()
        name = path.relative_to(FOLDER).as_posix()
        found[name] = File(body, KINDS[path.suffix], hashlib.sha256(body).hexdigest()[:32])
    return found


def is_public(path: str) -> bool:
    """Whether a path is one of the page's own, which need no key."""
    return path == "/" or path.startswith(PREFIX)


def routes() -> list[web.RouteDef]:
    return [web.get("/", _index), web.get(PREFIX + "{file:.+}", _file)]


async def _index(request: web.Request) -> web.Response:
    return _served(request, "index.html")


async def _file(request: web.Request) -> web.Response:
    return _served(request, request.match_info["file"])


def _served(request: web.Request, name: str) -> web.Response:
    file = files().get(name)
    if file is None:
        raise web.HTTPNotFound
    wanted = request.if_none_match
    fresh = wanted is not None and any(tag.value == file.tag for tag in wanted)
    response = web.Response(status=304, headers=HEADERS) if fresh else _whole(file)
    response.etag = ETag(file.tag)
    return response


def _whole(file: File) -> web.Response:
    return web.Response(body=file.body, content_type=file.kind, charset="utf-8", headers=HEADERS)
