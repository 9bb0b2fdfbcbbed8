"""What to read, in which order and in calls of which size. Pure.

A file is cut into pieces of the pool's slot size from its first byte: the piece at `offset` fills one slot from its
beginning; the last one is shorter. A span is any part of a piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

PAGE = 4096
MAX_BUFFERS = 512  # of one preadv; IOV_MAX is 1024


class Piece(NamedTuple):
    """`length` bytes at `offset` of the checkpoint's file number `file`."""

    file: int
    offset: int
    length: int

    @property
    def stop(self) -> int:
        return self.offset + self.length


class Landed(NamedTuple):
    """A span whose bytes are in the pool, as in `wire.Landed.pieces`."""

    file: int
    offset: int
    length: int
    pool_offset: int


class SizedFile(Protocol):
    """What planning needs of a file: its bytes, and how many of them are header."""

    @property
    def size(self) -> int: ...
    @property
    def data_offset(self) -> int: ...


def pieces(files: Sequence[SizedFile], resident: Collection[Piece], piece_bytes: int) -> list[Piece]:
    """All pieces that are not resident, in load order.

    All files' headers come first, so that the worker can lay the tensors out while the data are read.
    """
    heads: list[Piece] = []
    rest: list[Piece] = []
    for number, file in enumerate(files):
        for offset in range(0, file.size, piece_bytes):
            piece = Piece(number, offset, min(piece_bytes, file.size - offset))
            if piece not in resident:
                (heads if offset < file.data_offset else rest).append(piece)
    return heads + rest


def take(spans: deque[Piece], most: int) -> tuple[Piece, ...]:
    """The next call off the spans, of at most `most` bytes (a multiple of the page size): those that follow one another
    in one file, the last of them in part if need be."""
    call: list[Piece] = []
    while spans and most and len(call) < MAX_BUFFERS:
        span = spans[0]
        if call and (span.file, span.offset) != (call[-1].file, call[-1].stop):
            break
        length = min(span.length, most)
        if length == span.length:
            spans.popleft()
        else:
            spans[0] = Piece(span.file, span.offset + length, span.length - length)
        call.append(span._replace(length=length))
        most -= length
    return tuple(call)


def cut(piece: Piece, length: int) -> list[Piece]:
    """The piece as spans of at most `length` bytes."""
    return [
        Piece(piece.file, offset, min(length, piece.stop - offset))
        for offset in range(piece.offset, piece.stop, length)
    ]


def home(span: Piece, size: int, piece_bytes: int) -> Piece:
    """The piece that a span of a file of `size` bytes is part of."""
    offset = span.offset - span.offset % piece_bytes
    return Piece(span.file, offset, min(piece_bytes, size - offset))


def paced(rate: float, ceiling: int, page: int = PAGE) -> int:
    """Bytes of one call under a cap of `rate` bytes per second (0: none): 50 ms of it, in whole pages.

    Short calls make progress visible and cancellation prompt under a low cap.
    """
    if not rate:
        return ceiling
    return max(page, min(ceiling, int(rate * 0.05) // page * page))


def joined(landed: Iterable[Landed]) -> list[Landed]:
    """Spans that follow one another in a file, and in the pool, as one; their order stays."""
    runs: list[Landed] = []
    at, start, end = -1, 0, 0  # the run that may go on: its file and bytes
    ahead = 0  # of them, where they are in the pool
    for file, offset, length, place in landed:
        if file != at or offset != end or place - offset != ahead:
            if start < end:
                runs.append(Landed(at, start, end - start, start + ahead))
            at, start, ahead = file, offset, place - offset
        end = offset + length
    if start < end:
        runs.append(Landed(at, start, end - start, start + ahead))
    return runs


def locate(landed: Iterable[Landed], start: int, stop: int) -> list[tuple[int, int]] | None:
    """Where bytes [start, stop) of a file are in the pool, as (pool offset, length); None where some are not there.

    Args:
        landed: spans of that one file, in any order, without overlap.
    """
    parts: list[tuple[int, int]] = []
    for span in sorted(landed, key=lambda span: span.offset):
        if start < stop and span.offset <= start < span.offset + span.length:
            length = min(stop, span.offset + span.length) - start
            parts.append((span.pool_offset + start - span.offset, length))
            start += length
    return None if start < stop else parts
