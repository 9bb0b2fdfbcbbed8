"""A server of files on loopback that answers ranges, and does what servers on a network do: break off, lie, change.

The same files are there over plain HTTP (`url`) and as an S3-compatible bucket (`s3`), which lists them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import re
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from aiohttp import web

RANGE = re.compile(r"bytes=(\d+)-(\d+)")
BUCKET = "bucket"
CHUNK = 64 << 10  # bytes of one write: what a fault is exact to


@dataclass
class Faults:
    """What goes wrong; each as often as it says, or for as long as it is set.

    Attributes:
        statuses: file -> the status of every answer about it; of the name "", that of lists.
        fails_after: bytes of bodies that are sent in all; then every answer is 500.
        resets: answers that break off after `reset_after` bytes.
        budget: bytes of bodies that are sent in all; then everything hangs.
        late: seconds until an answer begins.
        drip: seconds between the bytes of a body, each of which comes alone; 0: none.
        shift: what Content-Range is off by.
        extra, missing: bytes that a body has more or fewer than were asked for.
        whole: ranges are not known: each answer is the whole file.
        deaf: nor is If-Match.
        etag: what ETags begin with; None: there are none.
        modified: what Last-Modified says; None: there is none.
        sent: bytes of bodies of answers that began with these faults.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    fails_after: int | None = None
    resets: int = 0
    reset_after: int = 0
    budget: int | None = None
    late: float = 0.0
    drip: float = 0.0
    shift: int = 0
    extra: int = 0
    missing: int = 0
    whole: bool = False
    deaf: bool = False
    etag: str | None = ""
    modified: str | None = "Thu, 01 Jan 2026 00:00:00 GMT"
    metadata: dict[str, str] = field(default_factory=dict)
    sent: int = 0


@dataclass
class RangeServer:
    """Serves `files`, path -> bytes, while it is entered. `sent`: bytes of bodies; `gets`: names of files read."""

    files: dict[str, bytes]
    faults: Faults = field(default_factory=Faults)
    sent: int = 0
    gets: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._released = asyncio.Event()
        app.on_shutdown.append(self._release)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port: int = self._runner.addresses[0][1]

    async def _release(self, _: web.Application) -> None:
        self._released.set()

    async def _released_within(self, seconds: float) -> None:
        if not seconds:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._released.wait(), seconds)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def s3(self) -> dict[str, str]:
        """The environment in which s3://bucket/... is here."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "here",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        }  # fmt: skip

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        for _ in range(2):  # so that the loop sees a client's end that came right behind what it had asked
            await asyncio.sleep(0)
        if request.transport is None or request.transport.is_closing():
            return web.Response()
        path = request.match_info["path"]
        listing = "list-type" in request.query
        name = "" if listing else path.removeprefix(f"{BUCKET}/")
        if listing and "" not in self.faults.statuses:
            return self._listing(request.query.get("prefix", ""))
        status = self.faults.statuses.get(name, 200 if name in self.files else 404)
        if self.faults.fails_after is not None and self.sent >= self.faults.fails_after:
            status = 500
        if status != 200:
            return web.Response(status=status)
        try:
            return await self._file(request, name)
        except ConnectionError:  # the client went: it was killed, or had enough
            return web.Response()

    def _listing(self, prefix: str) -> web.Response:
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{escape(self._etag(name))}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, data in sorted(self.files.items())
            if name.startswith(prefix)
        )
        return web.Response(
            text=f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>",
            content_type="application/xml",
        )

    def _etag(self, name: str) -> str:
        """Beginning with `W/`, a weak one, which matches nothing."""
        etag = f'"{self.faults.etag}{_md5(self.files[name])}"'
        return f'W/"{etag[3:]}' if etag.startswith('"W/') else etag

    async def _file(self, request: web.Request, name: str) -> web.StreamResponse:
        data, faults = self.files[name], self.faults
        headers = dict(faults.metadata)
        if faults.modified is not None:
            headers["Last-Modified"] = faults.modified
        if faults.etag is not None:
            headers["ETag"] = self._etag(name)
        wanted = request.headers.get("If-Match")
        if wanted is not None and not faults.deaf and (wanted != headers.get("ETag") or wanted.startswith("W/")):
            return web.Response(status=412)
        start, stop, status = 0, len(data), 200
        given = RANGE.match(request.headers.get("Range", ""))
        if given and not faults.whole:
            start, stop, status = int(given[1]), min(int(given[2]) + 1, len(data)), 206
            shown = start + faults.shift
            headers["Content-Range"] = f"bytes {shown}-{stop - 1 + faults.shift}/{len(data)}"
        body = data[start : stop - faults.missing] + bytes(faults.extra)
        headers["Content-Length"] = str(len(body))
        response = web.StreamResponse(status=status, headers=headers)
        await self._released_within(faults.late)
        await response.prepare(request)
        if request.method == "GET":
            self.gets.append(name)
            await self._send(request, response, body)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, body: bytes) -> None:
        faults = self.faults
        cut = len(body)
        if faults.resets:
            faults.resets -= 1
            cut = faults.reset_after
        step = 1 if faults.drip else CHUNK
        for at in range(0, cut, step):
            part = body[at : min(at + step, cut)]
            if faults.budget is not None and self.sent + len(part) > faults.budget:
                await self._released.wait()
                return
            self.sent += len(part)
            faults.sent += len(part)
            await response.write(part)
            await self._released_within(faults.drip)
        if cut < len(body) and request.transport is not None:
            request.transport.abort()


@functools.cache
def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()
