"""The control plane's events, streamed to operators who watch. One who is too slow is dropped, and delays nobody."""

from __future__ import annotations

import asyncio
import re
from collections import deque

from aiohttp import web

from serverless_llm.errors import RequestError
from serverless_llm.gateway import sse
from serverless_llm.gateway.failure import invalid

KEPT = 256  # events that a new watcher may ask for
BEHIND = 1024  # events that may wait for one watcher; it is dropped with the next
MOST = 64  # watchers at a time; arbitrary


class _Watcher:
    """One open stream, and what waits for it."""

    def __init__(self, request: web.Request, missed: list[bytes]) -> None:
        self._request = request
        self._waiting = deque(missed)
        self._news = asyncio.Event()
        self._news.set()
        self._closed = False

    def tell(self, event: bytes) -> None:
        self._waiting.append(event)
        self._news.set()
        if len(self._waiting) > BEHIND:
            self._waiting.clear()
            self.close()
            if self._request.transport is not None:
                self._request.transport.abort()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def run(self, response: web.StreamResponse, ping_every: float) -> None:
        """Sends what comes, and a comment where nothing does, until it is closed."""
        while not self._closed:
            try:
                async with asyncio.timeout(ping_every):
                    await self._news.wait()
            except TimeoutError:
                await response.write(sse.PING)
            self._news.clear()
            events = b"".join(b"data: " + event + b"\n\n" for event in self._waiting)
            self._waiting.clear()
            if events:
                await response.write(events)


class Feed:
    """All watchers of one gateway.

    Args:
        ping_every: seconds of silence after which a comment is sent, so that proxies keep the stream.
    """

    def __init__(self, ping_every: float) -> None:
        self._ping_every = ping_every
        self._recent: deque[bytes] = deque(maxlen=KEPT)
        self._watchers: set[_Watcher] = set()
        self._closed = False

    def tell(self, event: bytes) -> None:
        """A JSON object for everyone who watches. Never waits."""
        self._recent.append(event)
        for watcher in self._watchers:
            watcher.tell(event)

    def close(self) -> None:
        """Ends all streams, and begins none."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """`GET /admin/events?recent=N`: the last N events, then what comes.

        Raises:
            RequestError: 400 for a bad N, 503 when stopping or with too many watchers.
        """
        recent = request.query.get("recent", "0")
        if not re.fullmatch("[0-9]{1,3}", recent) or int(recent) > KEPT:
            raise invalid(f"recent must be a number up to {KEPT}", "recent")
        if self._closed or len(self._watchers) >= MOST:
            why = "the server is stopping" if self._closed else f"{MOST} others watch already"
            raise RequestError(503, "overloaded", why, retry_after=10.0)
        watcher = _Watcher(request, list(self._recent)[max(0, len(self._recent) - int(recent)) :])
        response = web.StreamResponse(headers=sse.HEADERS)
        self._watchers.add(watcher)
        try:
            await response.prepare(request)
            await watcher.run(response, self._ping_every)
        finally:
            self._watchers.discard(watcher)
        return response
