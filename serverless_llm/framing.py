"""Frames between processes: a fixed 32-byte header that relays read, and a body that they do not.

Header, little endian: magic and version (4 bytes), kind (u16), flags (u16), source (u32), destination (u32),
epoch (u64), length of the body (u64). Control links carry frames of at most 256 KiB; a longer body is split
into frames of which all but the last carry `MORE`. What a kind's body holds is in `wire.py`.

Addresses: 0 the controller, 1 ... 0xFFFF gateways, (n + 1) << 16 the agent of node n,
((n + 1) << 16) | (d + 1) the worker of its device d. `epoch` of a header is the head's generation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from serverless_llm.errors import ProtocolError

PROTOCOL = 6  # bumped with every incompatible change of a message
MAGIC = b"SLM" + bytes([PROTOCOL])
HEADER = struct.Struct("<4sHHIIQQ")
MAX_FRAME = 256 * 1024
MORE = 1  # flag: the body goes on in the next frame of this link with the same kind and source

CONTROLLER = 0
GATEWAY = 1


def agent_address(node: int) -> int:
    return (node + 1) << 16


def worker_address(node: int, device: int) -> int:
    return agent_address(node) | (device + 1)


class Header(NamedTuple):
    kind: int
    flags: int
    source: int
    destination: int
    epoch: int
    length: int


def pack(kind: int, body: bytes, source: int, destination: int, epoch: int) -> bytes:
    """The frame or frames of one body."""
    if len(body) <= MAX_FRAME:
        return HEADER.pack(MAGIC, kind, 0, source, destination, epoch, len(body)) + body
    return b"".join(_split(kind, body, source, destination, epoch))


def _split(kind: int, body: bytes, source: int, destination: int, epoch: int) -> Iterator[bytes]:
    for start in range(0, len(body), MAX_FRAME):
        part = body[start : start + MAX_FRAME]
        flags = MORE if start + MAX_FRAME < len(body) else 0
        yield HEADER.pack(MAGIC, kind, flags, source, destination, epoch, len(part)) + part


def unpack(raw: bytes | bytearray | memoryview) -> Header:
    """The header in the first 32 bytes of `raw`.

    Raises:
        ProtocolError: not this protocol, another version of it, or a frame over the limit.
    """
    magic, kind, flags, source, destination, epoch, length = HEADER.unpack_from(raw)
    if magic[:3] != MAGIC[:3]:
        raise ProtocolError("not a serverless-llm frame")
    if magic != MAGIC:
        raise ProtocolError(f"peer speaks protocol version {magic[3]}, this is version {PROTOCOL}")
    if length > MAX_FRAME:
        raise ProtocolError(f"frame of {length} bytes is over the limit of {MAX_FRAME}")
    return Header(kind, flags, source, destination, epoch, length)


class Frame(NamedTuple):
    """One whole message as it arrived; `raw` is what a relay passes on."""

    header: Header
    body: bytes
    raw: bytes


class Splitter:
    """Cuts a byte stream into whole messages, joining split bodies (at most `limit` bytes each)."""

    def __init__(self, limit: int = 16 << 20) -> None:
        self._buffer = bytearray()
        self._partial: dict[tuple[int, int], tuple[bytearray, bytearray]] = {}
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields every message that `data` completes.

        Raises:
            ProtocolError: see `unpack`; the stream is unusable afterwards.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            header = unpack(self._buffer)
            end = HEADER.size + header.length
            if len(self._buffer) < end:
                return
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            frame = self._join(header, raw)
            if frame is not None:
                yield frame

    def _join(self, header: Header, raw: bytes) -> Frame | None:
        key = (header.kind, header.source)
        if not header.flags & MORE and key not in self._partial:
            return Frame(header, raw[HEADER.size :], raw)
        body, raws = self._partial.setdefault(key, (bytearray(), bytearray()))
        body += raw[HEADER.size :]
        raws += raw
        if len(body) > self._limit:
            raise ProtocolError(f"message over the limit of {self._limit} bytes")
        if header.flags & MORE:
            return None
        del self._partial[key]
        return Frame(header, bytes(body), bytes(raws))
