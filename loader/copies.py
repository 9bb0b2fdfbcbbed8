"""Which bytes of a landed span go where in the arena. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from serverless_llm.loader.dest import Dest
from serverless_llm.loader.header import Header
from serverless_llm.loader.plan import Landed


class Copy(NamedTuple):
    """`length` bytes from `source` of the pool to `target` of the arena."""

    source: int
    target: int
    length: int


class _Wanted(NamedTuple):
    """Bytes [start, stop) of a file that go to `offset` of the arena."""

    start: int
    stop: int
    offset: int


class Copies:
    """All copies of one checkpoint. `total`: bytes to be written.

    Raises:
        KeyError: a Dest names a tensor that no header has.
    """

    def __init__(self, headers: Sequence[Header], dests: Iterable[Dest]) -> None:
        self._entries = [header.tensors for header in headers]
        self._ends = [[entry.end for entry in header.tensors] for header in headers]
        starts = {entry.name: entry.start for header in headers for entry in header.tensors}
        self._wanted: dict[str, list[_Wanted]] = defaultdict(list)
        self.total = 0
        for dest in dests:
            start = starts[dest.tensor]
            self._wanted[dest.tensor].append(_Wanted(start + dest.start, start + dest.stop, dest.offset))
            self.total += dest.stop - dest.start

    def of(self, span: Landed) -> Iterator[Copy]:
        """The copies that a span makes possible."""
        stop = span.offset + span.length
        entries = self._entries[span.file]
        for number in range(bisect_right(self._ends[span.file], span.offset), len(entries)):
            if entries[number].start >= stop:
                return
            for want in self._wanted.get(entries[number].name, ()):
                first, last = max(want.start, span.offset), min(want.stop, stop)
                if first < last:
                    source = span.pool_offset + first - span.offset
                    yield Copy(source, want.offset + first - want.start, last - first)
