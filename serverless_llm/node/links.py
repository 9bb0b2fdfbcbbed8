"""Framed links: a unix socket (agent <-> worker) and a WebSocket (head <-> agent).

Both hand whole messages, in order, to a callback on the loop, and take frames to write without blocking: what the
peer does not read is buffered up to `WRITE_LIMIT` bytes, beyond which the link is closed (the peer hangs).
A WebSocket message is a piece of the frames' byte stream: it may hold several frames or a part of one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

from aiohttp import ClientError, ClientWebSocketResponse, WSMsgType, web

from serverless_llm import framing
from serverless_llm.errors import ProtocolError

WRITE_LIMIT = 64 << 20  # bytes; some hundred prompts of 128 Ki tokens
BATCH = 1 << 20  # bytes; frames waiting together are written as one WebSocket message of about this size
CLOSE_LIMIT = 0.5  # seconds for the closing handshake; a peer that hangs never answers it
MAX_MESSAGE = 32 << 20  # bytes; above BATCH + the largest joined message of `framing.Splitter`
BEAT = 1.0  # seconds between pings
SILENCE = 5.0  # seconds without a sign of the peer, after which the link is half-open

Receive = Callable[[framing.Frame], None]
Closed = Callable[[str], None]


class SocketLink(asyncio.Protocol):
    """One end of a stream socket. `closed` is called once, with the cause; `receive` not after it."""

    def __init__(self, receive: Receive, closed: Closed) -> None:
        self._receive = receive
        self._closed = closed
        self._splitter = framing.Splitter()
        self._transport: asyncio.Transport | None = None
        self._cause = "the peer closed the link"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._splitter.feed(data):
                if self._transport is None:
                    return
                self._receive(frame)
        except ProtocolError as error:
            self.close(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._closed(str(exc) if exc else self._cause)

    def send(self, raw: bytes) -> None:
        """Writes frames; silently nothing once the link is closed (`closed` has told)."""
        if self._transport is None:
            return
        self._transport.write(raw)
        if self._transport.get_write_buffer_size() > WRITE_LIMIT:
            self.close(f"the peer left {WRITE_LIMIT} bytes unread")

    def close(self, cause: str) -> None:
        """Ends the link now, dropping what is unwritten."""
        self._cause = cause
        if self._transport is not None:
            self._transport.abort()


class WebSocketLink:
    """One end of a WebSocket. The owner awaits `run()`; `receive` is called from there.

    Args:
        socket: connected or prepared, with `autoping=False`, so that pongs count as signs of life here.
    """

    def __init__(
        self,
        socket: ClientWebSocketResponse | web.WebSocketResponse,
        receive: Receive,
        beat: float = BEAT,
        silence: float = SILENCE,
    ) -> None:
        self._socket = socket
        self._receive = receive
        self._beat = beat
        self._silence = silence
        self._splitter = framing.Splitter()
        self._unwritten: deque[bytes] = deque()
        self._unwritten_bytes = 0
        self._wakeup = asyncio.Event()
        self._unheard = 0  # beats since the peer's last sign
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send(self, raw: bytes) -> None:
        """Queues frames in order; silently nothing once the link has ended."""
        if self._end.done():
            return
        self._unwritten.append(raw)
        self._unwritten_bytes += len(raw)
        self._wakeup.set()
        if self._unwritten_bytes > WRITE_LIMIT:
            self.close(f"the peer left {WRITE_LIMIT} bytes unread")

    def close(self, cause: str) -> None:
        """Ends the link: `run` returns `cause`, frames not yet written are dropped."""
        if not self._end.done():
            self._end.set_result(cause)

    async def run(self) -> str:
        """Moves frames until the link ends, and returns the cause."""
        tasks = [asyncio.ensure_future(part()) for part in (self._read, self._write, self._watch)]
        try:
            done, _ = await asyncio.wait([self._end, *tasks], return_when=asyncio.FIRST_COMPLETED)
            self.close(done.pop().result())
        except (ClientError, OSError, ProtocolError) as error:
            self.close(str(error) or type(error).__name__)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._socket.close()
        return self._end.result()

    async def _read(self) -> str:
        while True:
            message = await self._socket.receive()
            self._unheard = 0
            if message.type is WSMsgType.BINARY:
                for frame in self._splitter.feed(message.data):
                    self._receive(frame)
                    await asyncio.sleep(0)  # tokens are written before what the next frame makes to do
                    if self._end.done():
                        return ""
            elif message.type is WSMsgType.PING:
                await self._socket.pong(message.data)
            elif message.type is not WSMsgType.PONG:
                return "the peer closed the link"

    async def _write(self) -> str:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._unwritten:
                await self._socket.send_bytes(self._batch())

    def _batch(self) -> bytes:
        parts = [self._unwritten.popleft()]
        size = len(parts[0])
        while self._unwritten and size + len(self._unwritten[0]) <= BATCH:
            parts.append(self._unwritten.popleft())
            size += len(parts[-1])
        self._unwritten_bytes -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _watch(self) -> str:
        """Counts silence in beats: after a standstill of this machine the peer's signs are yet to be read."""
        while self._unheard * self._beat < self._silence:
            # A ping may wait for a full socket; the silence is judged beside it.
            ping = asyncio.ensure_future(self._socket.ping())
            await asyncio.sleep(self._beat)
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)
            self._unheard += 1
        return f"the peer was silent for {self._silence:g} s"
