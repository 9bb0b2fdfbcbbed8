"""The least that a client can see: it answers unread and at once, its end comes as late as a stream's."""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

EVENT = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "word "}}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = HEAD + b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"E\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Floor(asyncio.Protocol):
    def __init__(self, later: float) -> None:
        self.later = later

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(FIRST)
        asyncio.get_running_loop().call_later(self.later, self.transport.write, LAST)


async def serve(port: int, later: float) -> None:
    """`later`: seconds from an answer's beginning to its end."""
    server = await asyncio.get_running_loop().create_server(lambda: Floor(later), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
