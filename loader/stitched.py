"""Stitched mappings: a checkpoint's files as address ranges, and those kept between two replicas.

A populated mapping costs a tenth of a second per 2 GiB to make from 4 KiB pages, and as much to unmap, so one outlives
its replica. A kept mapping is no lease: its slots may be given to another checkpoint and written meanwhile. That is
safe because nobody reads through it until its spans have landed again, hence are leased again, and `Stitched.show` has
compared where they lie now with what it shows. Its pages are the pool's own, so the bytes of a slot that lies where it
lay are those that landed, whatever was in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from serverless_llm.domain import CheckpointId
from serverless_llm.loader import plan
from serverless_llm.loader.header import Header
from serverless_llm.loader.memory import Range
from serverless_llm.loader.plan import Landed

RELEASE = 64 << 20  # bytes of one `release`: 2 to 5 ms

Slot = tuple[int, int]  # (file, the slot's offset in the file)


class Stitched:
    """Every file is one range into which its slots are mapped, read-only.

    Attributes:
        sizes: of the files.
        ranges: of each file.
        headers: by file, of those parsed so far.
        shown: the offset in the pool of every slot that is mapped.
    """

    def __init__(self, sizes: Sequence[int], slot_bytes: int, alignment: int, pool_fd: int) -> None:
        self.sizes = list(sizes)
        self.ranges = [Range(-(-size // slot_bytes) * slot_bytes, alignment) for size in sizes]
        self.headers: dict[int, Header] = {}
        self.shown: dict[Slot, int] = {}
        self._slot_bytes = slot_bytes
        self._pool_fd = pool_fd
        self._left = [(one, offset) for one in self.ranges for offset in range(0, one.length, RELEASE)]

    @property
    def nbytes(self) -> int:
        return len(self.shown) * self._slot_bytes

    def unused(self) -> bool:
        """Nothing made from its ranges is left."""
        return all(one.unused() for one in self.ranges)

    def slot(self, span: Landed) -> Slot:
        """The one in which the span begins."""
        return span.file, span.offset - span.offset % self._slot_bytes

    def cut(self, span: Landed) -> Iterator[Landed]:
        """Its parts, slot by slot."""
        at, stop = span.offset, span.offset + span.length
        while at < stop:
            end = min(stop, at - at % self._slot_bytes + self._slot_bytes)
            yield Landed(span.file, at, end - at, span.pool_offset + at - span.offset)
            at = end

    def show(self, spans: Iterable[Landed]) -> set[Slot]:
        """Maps the slots of these spans that are not shown; returns those whose page faults are still to be taken."""
        wanted: dict[Slot, int] = {}
        for file, offset, length, place in spans:
            first, ahead = offset - offset % self._slot_bytes, place - offset
            wanted |= {(file, slot): slot + ahead for slot in range(first, offset + length, self._slot_bytes)}
        changed = {slot: at for slot, at in sorted(wanted.items()) if self.shown.get(slot) != at}
        slots = (Landed(*slot, self._slot_bytes, at) for slot, at in changed.items())
        for run in plan.joined(slots):
            self.ranges[run.file].place(run.offset, run.length, self._pool_fd, run.pool_offset)
        self.shown |= changed
        return changed.keys() | self._missing(slot for slot in wanted if slot not in changed)

    def _missing(self, slots: Iterable[Slot]) -> set[Slot]:
        """Slots whose pages went: their memory was given back, and taken anew; the first page tells of all."""
        offsets = defaultdict(list)
        for file, offset in slots:
            offsets[file].append(offset)
        return {(file, offset) for file, some in offsets.items() for offset in self.ranges[file].missing(some)}

    def release(self) -> bool:
        """Gives back the page tables of at most `RELEASE` bytes. True: of all; dropping it is cheap now."""
        if self._left:
            one, offset = self._left.pop()
            one.release(offset, min(RELEASE, one.length - offset))
        return not self._left


class Kept:
    """Populated mappings that no replica uses, the longest kept first; together they show at most `budget` bytes.

    `discard` takes those that are not wanted any more: unmapping is too slow for the thread that owns this.
    """

    def __init__(self, budget: int, discard: Callable[[Stitched], None]) -> None:
        self._budget = budget
        self._discard = discard
        self._kept: dict[CheckpointId, tuple[Stitched, frozenset[int]]] = {}  # with the slots' offsets in the pool

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one, _ in self._kept.values())

    def keep(self, checkpoint: CheckpointId, stitched: Stitched) -> None:
        """All of `stitched` is populated, and it is unused. An older one of the checkpoint goes."""
        former = self.take(checkpoint)
        if former is not None:
            self._discard(former)
        self._kept[checkpoint] = stitched, frozenset(stitched.shown.values())
        while self.nbytes > self._budget:
            self._discard(self._kept.pop(next(iter(self._kept)))[0])

    def take(self, checkpoint: CheckpointId) -> Stitched | None:
        """It is the caller's now."""
        return self._kept.pop(checkpoint, (None,))[0]

    def handed(self, checkpoint: CheckpointId, slots: Iterable[int]) -> None:
        """Slots, by their offsets in the pool, hold this checkpoint: mappings that show one as another's go."""
        mine = set(slots)
        for name in [name for name, (_, shown) in self._kept.items() if name != checkpoint]:
            if not mine.isdisjoint(self._kept[name][1]):
                self._discard(self._kept.pop(name)[0])
