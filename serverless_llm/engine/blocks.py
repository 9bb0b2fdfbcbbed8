"""The plan of one device's memory: weights from the low end, slabs of KV blocks from the high end. Pure, no torch.

The device is one range of `budget` bytes. Slabs have one size, `slab_size(budget)`, and fixed places, counted from the
high end; a model whose block is larger than a slab takes runs of adjacent slabs. Each model carves its blocks from its
own spans (a slab or a run). A floor is a number of bytes that others cannot take, not a place: a span goes back as soon
as its last block is free, so an idle model holds nothing, and its floor is only kept from the others.

Weights lie in numbered extents, one for each buffer. A replica may refer to extents of others that hold the same bytes;
an extent's bytes are free when the last replica that refers to it is removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from math import gcd
from typing import NamedTuple

from serverless_llm.domain import ReplicaId
from serverless_llm.engine.config import aligned
from serverless_llm.errors import InvariantError

SLAB_STEP = 64 << 10  # bytes; a multiple of the page size, so that a freed slab can go back to the system
SLAB_MOST = 32 << 20
RUNS = 4  # lengths of a span that are tried for one that blocks fill to 7/8
SLABS = 256  # aimed at per device: rounding costs each model at most 0.4 % of the budget


def slab_size(budget: int) -> int:
    """Bytes of a slab: budget / 256 in steps of 64 KiB, at least 64 KiB, at most 32 MiB."""
    return min(max(budget // SLABS // SLAB_STEP * SLAB_STEP, SLAB_STEP), SLAB_MOST)


class Range(NamedTuple):
    """Bytes [offset, offset + size) of the device."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    def overlaps(self, other: Range) -> bool:
        return self.offset < other.end and other.offset < self.end


class _Span:
    """One run of slabs, carved into blocks that begin on multiples of the model's layer size."""

    def __init__(self, slabs: range, place: Range, block: int, layer: int) -> None:
        first = aligned(place.offset, layer)
        self.slabs = slabs
        self.place = place
        self.blocks = (place.end - first) // block
        self.free = [first + number * block for number in range(self.blocks)]
        self.taken: set[int] = set()


class _Pool:
    """The blocks of one model."""

    def __init__(self, block: int, layer: int, floor: int, slab: int, budget: int) -> None:
        self.block = block
        self.layer = layer
        self.floor = floor  # bytes
        lost = layer - gcd(layer, slab, budget)  # before a span's first block, at most
        least = -(-(block + lost) // slab)
        fits = {run: (run * slab - lost) // block for run in range(least, least + RUNS)}
        self.run = min(fits, key=lambda run: (fits[run] * block * 8 < run * slab * 7, run))  # slabs in a span
        self.span_blocks = fits[self.run]  # in a span, at least
        self.spans: list[_Span] = []
        self.of: dict[int, _Span] = {}  # taken block -> its span

    @property
    def slabs(self) -> int:
        return len(self.spans) * self.run

    @property
    def free(self) -> int:
        return sum(len(span.free) for span in self.spans)


class Memory:
    """Who has which bytes of one device.

    Attributes:
        fresh: blocks given out since the owner last emptied this list; their bytes are whatever was there before.
        vacated: bytes were given back since the owner last set this to False.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.slab = slab_size(budget)
        self.fresh: list[Range] = []
        self.vacated = False
        self._pools: dict[ReplicaId, _Pool] = {}
        self._extents: dict[int, Range] = {}
        self._holders: Counter[int] = Counter()  # of each extent
        self._referred: dict[ReplicaId, list[int]] = {}  # its extents
        self._extents_made = 0
        self._pinned: dict[ReplicaId, int] = {}
        self._slabs: list[ReplicaId | None] = [None] * (budget // self.slab)
        self._open = set(range(len(self._slabs)))  # slabs that neither a span nor an extent touches

    # --- weights ---

    def place(
        self,
        replica: ReplicaId,
        extents: list[int],
        pinned: int,
        floor: int,
        block: int,
        layer: int,
        shared: Collection[int] = (),
    ) -> list[int] | None:
        """Takes a replica in: where each extent begins, or None where it does not fit as things are.

        `extents`: bytes of each buffer that it brings; `pinned`: bytes of weights that lie elsewhere and only count;
        `floor`: bytes of KV promised; `block` and `layer`: bytes of a KV block and of one layer in it; `shared`: the
        extents of others that it refers to, too.
        """
        if self.free_bytes < sum(aligned(size) for size in extents) + pinned + floor:
            return None
        placed: list[Range] = []
        for size in extents:
            place = self._gap(aligned(size), placed)
            if place is None:
                return None
            placed.append(place)
        made = range(self._extents_made, self._extents_made + len(placed))
        self._extents_made = made.stop
        self._extents.update(zip(made, placed, strict=True))
        self._referred[replica] = [*made, *shared]
        self._holders.update(self._referred[replica])
        self._pinned[replica] = pinned
        self._pools[replica] = _Pool(block, layer, floor, self.slab, self.budget)
        self._open -= {slab for slab in self._open if any(self._place(slab, 1).overlaps(other) for other in placed)}
        return [place.offset for place in placed]

    def remove(self, replica: ReplicaId) -> None:
        """Forgets a replica; its blocks must be free."""
        if self._pools[replica].spans:
            raise InvariantError(f"replica {replica} is removed while it holds {self._pools[replica].slabs} slabs")
        del self._pools[replica], self._pinned[replica]
        for number in self._referred.pop(replica):
            self._holders[number] -= 1
            if not self._holders[number]:
                del self._holders[number], self._extents[number]
                self.vacated = True
        stored = self._stored()
        for slab, owner in enumerate(self._slabs):
            if owner is None and not any(self._place(slab, 1).overlaps(other) for other in stored):
                self._open.add(slab)

    def extents(self, replica: ReplicaId) -> list[int]:
        """Its extents: those it brought, in their order, and those of others."""
        return self._referred[replica]

    @property
    def free_bytes(self) -> int:
        """Bytes that are neither weights nor KV in use nor promised to a model's floor."""
        kv = sum(max(pool.slabs * self.slab, pool.floor) for pool in self._pools.values())
        return self.budget - self._weights() - kv

    @property
    def free_above_floors(self) -> int:
        """`free_bytes` if every model gave back all KV above its floor."""
        return self.budget - self._weights() - sum(pool.floor for pool in self._pools.values())

    def _weights(self) -> int:
        return sum(place.size for place in self._extents.values()) + sum(self._pinned.values())

    def _gap(self, size: int, placed: list[Range]) -> Range | None:
        """The lowest free range of `size` bytes."""
        taken = sorted([*placed, *self._stored(), *self._slab_places()])
        at = 0
        for other in taken:
            if other.offset - at >= size:
                break
            at = max(at, other.end)
        return Range(at, size) if at + size <= self.budget else None

    def _stored(self) -> list[Range]:
        return [*self._extents.values()]

    def _slab_places(self) -> list[Range]:
        return [span.place for pool in self._pools.values() for span in pool.spans]

    # --- KV ---

    def allocate(self, replica: ReplicaId) -> int | None:
        """The offset of a block, None where there is none to be had."""
        pool = self._pools[replica]
        span = next((span for span in pool.spans if span.free), None) or self._grow(replica, pool)
        if span is None:
            return None
        block = span.free.pop(0)
        span.taken.add(block)
        pool.of[block] = span
        self.fresh.append(Range(block, pool.block))
        return block

    def free(self, replica: ReplicaId, blocks: list[int]) -> None:
        """Takes blocks back, and whole spans from their model."""
        pool = self._pools[replica]
        for block in blocks:
            span = pool.of.pop(block)
            span.taken.remove(block)
            span.free.append(block)
            if not span.taken:
                pool.spans.remove(span)
                for slab in span.slabs:
                    self._slabs[slab] = None
                self._open.update(span.slabs)
                self.vacated = True

    def available(self, replica: ReplicaId) -> int:
        """Blocks that `allocate` would give now, more where free slabs do not form its runs."""
        pool = self._pools[replica]
        return pool.free + self._spare(replica) // pool.run * pool.span_blocks

    def capacity(self, replica: ReplicaId) -> int:
        """Blocks that this model could have if all others kept to their floors."""
        pool = self._pools[replica]
        whole = (self.budget - self._weights()) // self.slab
        slabs = min(whole, len(self._open) + self._held())
        return (slabs - self._floors(replica)) // pool.run * pool.span_blocks

    def most(self, replica: ReplicaId) -> int:
        """Blocks that this model could have if no other were here."""
        pool = self._pools[replica]
        weights = sum(self._extents[number].size for number in self._referred[replica]) + self._pinned[replica]
        return max(0, self.budget - weights) // self.slab // pool.run * pool.span_blocks

    def above_floor(self, replica: ReplicaId) -> bool:
        """Whether some of this model's KV can be taken from it."""
        pool = self._pools[replica]
        return pool.slabs * self.slab > pool.floor

    def vacant(self) -> list[Range]:
        """Where nothing lies, in the order of offsets."""
        taken = sorted([*self._stored(), *self._slab_places()])
        begins, ends = [0, *(place.end for place in taken)], [*(place.offset for place in taken), self.budget]
        return [Range(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if begin < end]

    def used(self) -> int:
        """Bytes in blocks given out."""
        return sum(len(pool.of) * pool.block for pool in self._pools.values())

    def kv_free(self) -> int:
        """Bytes that blocks could still take."""
        return max(0, self.budget - self._weights() - self.used())

    def _held(self) -> int:
        return sum(pool.slabs for pool in self._pools.values())

    def _floors(self, replica: ReplicaId, filled: bool = False) -> int:
        """Slabs promised to the others; with `filled`, only those that they do not hold yet."""
        others = (pool for other, pool in self._pools.items() if other != replica)
        return sum(max(0, pool.floor // self.slab - (pool.slabs if filled else 0)) for pool in others)

    def _spare(self, replica: ReplicaId) -> int:
        """Slabs that this model may take."""
        whole = (self.budget - self._weights()) // self.slab - self._held()
        return max(0, min(whole, len(self._open)) - self._floors(replica, filled=True))

    def _place(self, slab: int, run: int) -> Range:
        """The bytes of `run` slabs of which `slab` is the highest."""
        return Range(self.budget - (slab + run) * self.slab, run * self.slab)

    def _grow(self, replica: ReplicaId, pool: _Pool) -> _Span | None:
        if self._spare(replica) < pool.run:
            return None
        for slab in sorted(self._open):
            slabs = range(slab, slab + pool.run)
            if self._open.issuperset(slabs):
                span = _Span(slabs, self._place(slab, pool.run), pool.block, pool.layer)
                for taken in slabs:
                    self._slabs[taken] = replica
                self._open.difference_update(slabs)
                pool.spans.append(span)
                return span
        return None

    def check_invariants(self) -> None:
        """Raises InvariantError where two owners share bytes or a count is wrong."""
        holders = Counter(number for held in self._referred.values() for number in held)
        if holders != self._holders or holders.keys() != self._extents.keys():
            raise InvariantError(f"{self._extents} are held by {self._referred}, counted {self._holders}")
        taken = sorted([*self._stored(), *self._slab_places()])
        for before, after in pairwise(taken):
            if before.overlaps(after):
                raise InvariantError(f"{before} and {after} overlap")
        if taken and (taken[0].offset < 0 or taken[-1].end > self.budget):
            raise InvariantError(f"{taken} leave the budget of {self.budget} bytes")
        if self._weights() + self._held() * self.slab > self.budget:
            raise InvariantError("weights and slabs together exceed the budget")
        for replica, pool in self._pools.items():
            _check_pool(replica, pool)
        owned = [owner for owner in self._slabs if owner is not None]
        if len(owned) != self._held():
            raise InvariantError(f"{len(owned)} slabs have an owner, {self._held()} are held")


def _check_pool(replica: ReplicaId, pool: _Pool) -> None:
    for span in pool.spans:
        blocks = sorted([*span.free, *span.taken])
        if len(blocks) != span.blocks or len(set(blocks)) != len(blocks) or not span.taken:
            raise InvariantError(f"replica {replica}: blocks of {span.place} are lost, doubled or all free")
        if any(block % pool.layer or block < span.place.offset for block in blocks):
            raise InvariantError(f"replica {replica}: a block of {span.place} is misplaced")
        if blocks[-1] + pool.block > span.place.end:
            raise InvariantError(f"replica {replica}: a block leaves {span.place}")
    if {block for span in pool.spans for block in span.taken} != set(pool.of):
        raise InvariantError(f"replica {replica}: taken blocks and their index differ")
