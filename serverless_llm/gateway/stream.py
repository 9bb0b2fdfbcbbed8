"""A streaming answer: its pieces of text, heartbeats in between, and its end.

What a frame of tokens brings is written at once, while the frame is read: the handler's task sleeps through it. It is
woken for the rest: the first piece, the end, heartbeats, a client who is slow to read, and several choices, for what a
frame brings to all of them is one write.
"""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from serverless_llm.gateway import answers, sse
from serverless_llm.gateway.live import LiveRequest
from serverless_llm.gateway.options import GatewayOptions

SURE_BYTES = 32 << 10  # into an empty buffer: a write that never waits (asyncio's transports pause at 64 KiB)


class Stream:
    """Owned by the request's handler. `response`: prepared."""

    def __init__(
        self, live: LiveRequest, http: web.Request, response: web.StreamResponse, options: GatewayOptions
    ) -> None:
        self._live = live
        self._http = http
        self._response = response
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._parts = [answers.ChoiceStream(choice) for choice in live.choices]
        self._chunked = response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"  # not so in HTTP/1.0

    async def run(self) -> None:
        """
        Raises:
            ConnectionError: the client is gone, or takes nothing for too long.
        """
        live = self._live
        live.deadline = self._next_beat() if live.begun else self._clock()  # headers alone: a heartbeat follows them
        while not live.done:
            out = self._news()
            if not out and self._clock() >= live.deadline:
                out = self._heartbeat()
            if out:
                await self._write(out)
                live.deadline = self._next_beat()
                if len(live.choices) == 1:
                    live.flush = self._flush  # from now on, for the headers have left with this
            await live.news(live.deadline)
        await self._write(self._news() + self._end())

    def _flush(self) -> None:
        """There is text. Where the client is slow to take it, it is the task's to write."""
        transport = self._http.transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            self._live.wake()
            return
        data = self._news()
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
            self._live.deadline = self._next_beat()

    def _news(self) -> bytes:
        out = b"".join([part.news() for part in self._parts])
        if self._live.unfinished < len(self._parts):
            self._parts = [part for part in self._parts if not part.ended]
        return out

    def _next_beat(self) -> float:
        return self._clock() + self._options.heartbeat_every

    def _heartbeat(self) -> bytes:
        return sse.PING if self._options.heartbeat == "comment" else self._parts[0].heartbeat()

    def _end(self) -> bytes:
        live = self._live
        if live.error is not None:
            return sse.failed(live.error)
        return sse.closing(answers.identity(live), answers.usage(live) if live.request.include_usage else None)

    async def _write(self, data: bytes) -> None:
        """
        Raises:
            ConnectionError: the client is gone, or takes nothing for too long.
        """
        transport = self._http.transport
        if len(data) < SURE_BYTES and transport is not None and not transport.get_write_buffer_size():
            await self._response.write(data)
            return
        try:
            async with asyncio.timeout(self._options.write_stall):
                await self._response.write(data)
        except TimeoutError:
            raise ConnectionAbortedError("the client does not read") from None
