"""A load generator that costs little: raw HTTP over asyncio, one connection a stream, chunks counted and not parsed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import cast

MARK = b'"content":'
END = b"\r\n0\r\n\r\n"  # of a chunked answer; a header may end in 0, too
WORDS = ("abacus", "baking", "copper", "dragon", "ember", "fabric", "garden", "harbor", "island", "jungle")


@dataclass(slots=True)
class Stream:
    """What one stream saw. Seconds; `ttft`: from the request's last byte sent to the first byte of text."""

    ttft: float = 0.0
    chunks: int = 0
    last: float = 0.0
    worst_gap: float = 0.0


def request(model: str, tokens: int, stream: bool, chance: random.Random) -> bytes:
    """A chat request of 60 random words."""
    prompt = " ".join(chance.choices(WORDS, k=60))
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": stream}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nAuthorization: Bearer none\r\n\r\n".encode() + data


class Connection(asyncio.Protocol):
    """One keep-alive connection; `ask` sends and waits for the whole answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.seen = Stream()
        self.sent = 0.0
        self.tail = b""
        self.streaming = True
        self.missing = 0
        self.answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, data: bytes, streaming: bool = True) -> Stream:
        self.seen, self.tail, self.streaming, self.missing = Stream(), b"", streaming, 0
        self.answered = asyncio.get_running_loop().create_future()
        assert self.transport is not None
        self.transport.write(data)
        self.sent = time.perf_counter()
        await self.answered
        return self.seen

    def data_received(self, data: bytes) -> None:
        now, seen = time.perf_counter(), self.seen
        if not self.streaming:
            self._whole(data)
            return
        found = data.count(MARK)
        if found:
            if not seen.chunks:
                seen.ttft = now - self.sent
            else:
                seen.worst_gap = max(seen.worst_gap, now - seen.last)
            seen.chunks, seen.last = seen.chunks + found, now
        self.tail = (self.tail + data)[-len(END) :]
        if self.tail == END:
            self._end()

    def _whole(self, data: bytes) -> None:
        self.tail += data
        head, split, body = self.tail.partition(b"\r\n\r\n")
        if split:
            fields = [line.partition(b":") for line in head.lower().split(b"\r\n")]
            length = next(int(value) for name, _, value in fields if name == b"content-length")
            if len(body) >= length:
                assert head.startswith(b"HTTP/1.1 200"), self.tail
                self._end()

    def _end(self) -> None:
        assert self.answered is not None
        if not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(ConnectionError(f"the server hung up: {self.tail!r}"))


async def connect(host: str, port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
    return connection
