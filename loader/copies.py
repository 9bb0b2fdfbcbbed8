"""Which bytes of a landed span go where in the arena. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from serverless_llm.loader.dest import Dest
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import NOTHING, Lent


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

    Args:
        lent: what of it is in files of others.

    Raises:
        KeyError: a Dest names a tensor that no header has.
    """

    def __init__(self, headers: Sequence[Header], dests: Iterable[Dest], lent: Lent = NOTHING) -> None:
        self._entries: list[list[TensorEntry]] = [[] for _ in (*headers, *lent.sizes)]
        for number, header in enumerate(headers):
            for file, entry in (lent.find(number, entry) for entry in header.tensors):
                self._entries[file].append(entry)
        for entries in self._entries[len(headers) :]:
            entries.sort(key=lambda entry: entry.end)
        self._ends = [[entry.end for entry in entries] for entries in self._entries]
        starts = {entry.name: entry.start for entries in self._entries for entry in entries}
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
