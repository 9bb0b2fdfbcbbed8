"""The DRAM tier: which piece of which checkpoint is in which slot of the pool. Pure.

A piece is *reserved* (it owns a slot, its bytes are on their way) or *landed*. A checkpoint is leased by the replicas
whose tensors are views into it, or that are being loaded from it: neither its slots nor those of an unfinished read
are ever given to another. Who refers to some tensors only, since those of its own checkpoint are equal to them, leases
the pieces that have them.

Where room is short, those bytes leave first that are worth least: what it costs to bring them back x how likely they
are used. How likely tells a weight of their uses that halves with time.

Free slots are *ready* (their memory was taken) or *bare*. To take memory while reading costs more than the reading
itself, so some ready ones are kept ahead of need, and more are not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serverless_llm.domain import CheckpointId, ReplicaId
from serverless_llm.errors import CapacityError, InvariantError
from serverless_llm.loader.plan import Piece
from serverless_llm.quantities import size

HALF_S = 3600.0  # after so long a use tells half as much; arbitrary: a model in use is loaded some times an hour
ByteCost = Callable[[CheckpointId], float]  # seconds, more than 0, that each byte of a checkpoint takes to come back


def equal(checkpoint: CheckpointId) -> float:
    """The `ByteCost` where bytes all come back over one link."""
    return 1.0


class Uses(NamedTuple):
    """Of a checkpoint: `weight` at the time `last`, half as much with every `HALF_S` from then on."""

    weight: float
    last: float

    def until(self, now: float, more: int) -> Uses:
        """With `more` of them at `now`. It was used until now: that counts as one at least."""
        return Uses(max(1.0, self.weight * 2 ** ((self.last - now) / HALF_S) + more), now)


def value(uses: Uses, byte_s: float) -> float:
    """Cost to bring a byte back x probability of use, by which checkpoints are compared: the product's logarithm.

    All weights halve alike, so that the order of two is the same at any time: that of the time 0 tells it
    (forward decay, Cormode et al. 2009).
    """
    return math.log2(byte_s * uses.weight) + uses.last / HALF_S


class Reservation(NamedTuple):
    """`slots`: of every piece asked for; `missing`: pieces yet to be read; `evicted`: slots taken from others."""

    slots: dict[Piece, int]
    missing: list[Piece]
    evicted: int


@dataclass(slots=True)
class _Resident:
    slots: dict[Piece, int] = field(default_factory=dict)
    landed: set[Piece] = field(default_factory=set)
    holders: dict[ReplicaId, frozenset[Piece] | None] = field(default_factory=dict)  # what of it; None: all
    reading: bool = False  # a read may still write into slots that have not landed
    doomed: bool = False  # leaves the tier with its last lease

    @property
    def idle(self) -> bool:
        return not self.holders and not self.reading

    @property
    def borrowed(self) -> set[Piece]:
        """Those that replicas refer to who wait for no more of it."""
        return {piece for pieces in self.holders.values() if pieces is not None for piece in pieces}

    def loose(self) -> list[Piece]:
        """Those with a slot that nothing refers to, in order."""
        if self.reading:
            return []
        held: set[Piece] = set()
        for pieces in self.holders.values():
            held.update(self.slots if pieces is None else pieces)
        return sorted(self.slots.keys() - held)


class Tier:
    """`slots` slots of `slot_bytes` bytes, all bare at first. `now` is any clock's seconds that never run backwards.

    Attributes:
        wanted: how many free slots are to be ready.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.wanted = 0
        self._ready: list[int] = []  # heaps: low numbers first, so that runs stay contiguous
        self._bare = list(range(slots))
        self._lent: set[int] = set()
        self._residents: dict[CheckpointId, _Resident] = {}
        self._uses: dict[CheckpointId, Uses] = {}  # of those that left, too, until they are forgotten

    def reserve(
        self, checkpoint: CheckpointId, pieces: Sequence[Piece], now: float, byte_s: ByteCost = equal
    ) -> Reservation:
        """Gives every piece a slot, evicting idle checkpoints for those that have none. All or nothing.

        When `missing` is not empty the caller reads them, and says `land` for each, or `abort`.

        Args:
            pieces: all pieces of the checkpoint that the load needs, whether resident or not.
            byte_s: asked of those that may leave.

        Raises:
            CapacityError: too little would be left even if every idle checkpoint went.
        """
        resident = self._residents.get(checkpoint) or _Resident()
        homeless = self.homeless(checkpoint, pieces)
        evicted = self._make_room(checkpoint, len(homeless), byte_s)
        self._residents[checkpoint] = resident
        resident.doomed = False
        self._use(checkpoint, now, 1)
        for piece in homeless:
            resident.slots[piece] = heapq.heappop(self._ready or self._bare)
        missing = [piece for piece in pieces if piece not in resident.landed]
        resident.reading = bool(missing)
        return Reservation({piece: resident.slots[piece] for piece in pieces}, missing, evicted)

    def room(self, checkpoint: CheckpointId) -> tuple[int, int]:
        """Slots that are free, and those that would be if all idle checkpoints but this one left."""
        return self._free, self._free + sum(len(pieces) for _, pieces in self._victims(checkpoint))

    def lend(self, checkpoint: CheckpointId, count: int, byte_s: ByteCost = equal) -> list[int]:
        """Slots that belong to no piece until they are given back; evicts as `reserve` does, but nothing of
        `checkpoint`.

        Raises:
            CapacityError: as `reserve`.
        """
        self._make_room(checkpoint, count, byte_s)
        slots = [heapq.heappop(self._ready or self._bare) for _ in range(count)]
        self._lent.update(slots)
        return slots

    def give_back(self, slots: Iterable[int]) -> None:
        """Nothing refers to these lent slots any more."""
        for slot in slots:
            self._lent.remove(slot)
            heapq.heappush(self._ready, slot)

    @property
    def lent(self) -> int:
        """Slots that are still to be given back."""
        return len(self._lent)

    def shed(self, checkpoint: CheckpointId, pieces: Iterable[Piece]) -> None:
        """An idle checkpoint gives up these pieces, for others of its own; one in use gives up none."""
        resident = self._residents.get(checkpoint)
        if resident is not None and resident.idle:
            resident.landed.difference_update(pieces)
            self._settle(checkpoint)

    def homeless(self, checkpoint: CheckpointId, pieces: Iterable[Piece]) -> list[Piece]:
        """Those of `pieces` that have no slot."""
        resident = self._residents.get(checkpoint)
        return [piece for piece in pieces if resident is None or piece not in resident.slots]

    def read(self, checkpoint: CheckpointId) -> None:
        """A read of reserved pieces begins: their slots are nobody else's until it has ended, whoever leaves."""
        self._residents[checkpoint].reading = True

    def land(self, checkpoint: CheckpointId, pieces: Iterable[Piece]) -> None:
        """The bytes of these reserved pieces are in their slots."""
        resident = self._residents[checkpoint]
        resident.landed.update(pieces)
        if len(resident.landed) == len(resident.slots):
            resident.reading = False
            self._settle(checkpoint)

    def abort(self, checkpoint: CheckpointId, discard: bool = False) -> None:
        """The reading ended early, and its last read has returned: what has not landed loses its slots.

        `discard`: the landed bytes are not to be trusted either, but for what is `borrowed`: that came before, and is
        not to be read again beneath who refers to it. Slots go with the last lease.
        """
        resident = self._residents[checkpoint]
        resident.reading = False
        if discard:
            resident.landed &= resident.borrowed
        self._settle(checkpoint)

    def discard(self, checkpoint: CheckpointId, pieces: Iterable[Piece]) -> None:
        """The bytes of these pieces are not to be trusted. No read of the checkpoint is under way."""
        if checkpoint in self._residents:
            self._residents[checkpoint].landed.difference_update(pieces)
            self._settle(checkpoint)

    def lease(self, checkpoint: CheckpointId, holder: ReplicaId, pieces: Collection[Piece] | None = None) -> None:
        """`holder` may refer to the checkpoint's slots until it is released; with `pieces`, only to those of these
        landed ones from now on."""
        held = None if pieces is None else frozenset(pieces)
        self._residents.setdefault(checkpoint, _Resident()).holders[holder] = held
        self._settle(checkpoint)

    def release(self, checkpoint: CheckpointId, holder: ReplicaId, now: float) -> None:
        """`holder` refers to no slot of the checkpoint any more. Idempotent."""
        resident = self._residents.get(checkpoint)
        if resident is not None and holder in resident.holders:
            del resident.holders[holder]
            if not resident.doomed:
                self._use(checkpoint, now, 0)
            self._settle(checkpoint)

    def forget(self, checkpoint: CheckpointId) -> None:
        """No model names the checkpoint any more: it goes, at once or with its last lease. Idempotent."""
        self._uses.pop(checkpoint, None)
        if checkpoint in self._residents:
            self._residents[checkpoint].doomed = True
            self._settle(checkpoint)

    def missing(self, checkpoint: CheckpointId, pieces: Iterable[Piece]) -> list[Piece]:
        """Those of `pieces` that have not landed."""
        resident = self._residents.get(checkpoint)
        return [piece for piece in pieces if resident is None or piece not in resident.landed]

    def landed(self, checkpoint: CheckpointId) -> dict[Piece, int]:
        """The slots of the pieces that have landed."""
        resident = self._residents.get(checkpoint, _Resident())
        return {piece: resident.slots[piece] for piece in resident.landed}

    def borrowed(self, checkpoint: CheckpointId) -> set[Piece]:
        """What replicas refer to who wait for no more of it."""
        return self._residents.get(checkpoint, _Resident()).borrowed

    def lendable(self, checkpoint: CheckpointId) -> set[Piece]:
        """The pieces that have landed; none while it is read: an error may yet say that what came is not it."""
        resident = self._residents.get(checkpoint, _Resident())
        return set() if resident.reading else resident.landed

    def residents(self) -> list[tuple[CheckpointId, int]]:
        """(checkpoint, landed bytes), for all that have any."""
        sizes = ((name, sum(piece.length for piece in one.landed)) for name, one in self._residents.items())
        return [(name, size) for name, size in sizes if size]

    def holders(self, checkpoint: CheckpointId) -> frozenset[ReplicaId]:
        resident = self._residents.get(checkpoint)
        return frozenset(resident.holders) if resident else frozenset()

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that nothing refers to, ready ones first."""
        return (*self._ready, *self._bare)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use, landed or reserved."""
        return (self.slots - self._free) * self.slot_bytes

    def grow(self) -> int | None:
        """A bare slot to be made ready, counted as such from now on; None: enough are. Until its memory is there it
        may be given out like any other, and is only slower to read into."""
        if len(self._ready) >= self.wanted or not self._bare:
            return None
        slot = heapq.heappop(self._bare)
        heapq.heappush(self._ready, slot)
        return slot

    def shrink(self) -> int | None:
        """A ready slot that is one too many: its memory goes back before anything else is done. None: there is none."""
        if len(self._ready) <= self.wanted:
            return None
        slot = self._ready.pop()  # the last of a heap is one of the highest
        heapq.heappush(self._bare, slot)
        return slot

    @property
    def _free(self) -> int:
        return len(self._ready) + len(self._bare)

    def _use(self, checkpoint: CheckpointId, now: float, more: int) -> None:
        self._uses[checkpoint] = self._uses.get(checkpoint, Uses(0.0, now)).until(now, more)

    def _make_room(self, checkpoint: CheckpointId, needed: int, byte_s: ByteCost) -> int:
        """Evicts until `needed` slots are free; the number of slots evicted."""

        def worth(victim: tuple[CheckpointId, list[Piece]]) -> tuple[float, float, CheckpointId]:
            name, uses = victim[0], self._uses[victim[0]]
            return value(uses, byte_s(name)), uses.last, name

        victims = self._victims(checkpoint)
        available = self._free + sum(len(pieces) for _, pieces in victims)
        if needed > available:
            raise self.short(needed, available)
        evicted = 0
        for name, pieces in sorted(victims, key=worth):
            while pieces and self._free < needed:  # the last goes first: what is left is read past without a seek
                self._evict(name, pieces.pop())
                evicted += 1
        return evicted

    def short(self, needed: int, available: int) -> CapacityError:
        """What to say where more slots are needed than could be had."""
        return CapacityError(
            f"{size(needed * self.slot_bytes)} of DRAM are needed for the weights, "
            f"{size(available * self.slot_bytes)} of {size(self.slots * self.slot_bytes)} are available; "
            "serve has --dram"
        )

    def _victims(self, checkpoint: CheckpointId) -> list[tuple[CheckpointId, list[Piece]]]:
        """What the others have that nothing refers to."""
        others = ((name, one.loose()) for name, one in self._residents.items() if name != checkpoint)
        return [(name, pieces) for name, pieces in others if pieces]

    def _evict(self, checkpoint: CheckpointId, piece: Piece) -> None:
        resident = self._residents[checkpoint]
        resident.landed.discard(piece)
        heapq.heappush(self._ready, resident.slots.pop(piece))
        if not resident.slots:
            del self._residents[checkpoint]

    def _settle(self, checkpoint: CheckpointId) -> None:
        """Frees what the checkpoint need not keep."""
        resident = self._residents[checkpoint]
        keep = set() if resident.doomed else resident.landed
        for piece in [piece for piece in resident.loose() if piece not in keep]:
            heapq.heappush(self._ready, resident.slots.pop(piece))
            resident.landed.discard(piece)
        if resident.idle and not resident.slots:
            del self._residents[checkpoint]

    def check_invariants(self) -> None:
        """Raises:
        InvariantError: a slot has two owners or none, or a piece landed without a slot.
        """
        owned = [slot for one in self._residents.values() for slot in one.slots.values()]
        if sorted([*owned, *self._lent, *self.free_slots]) != list(range(self.slots)):
            raise InvariantError(
                f"slots have two owners or none: owned {sorted(owned)}, lent {sorted(self._lent)}, "
                f"free {sorted(self.free_slots)}"
            )
        for name, one in self._residents.items():
            if not one.landed <= one.slots.keys():
                raise InvariantError(f"{name} has landed pieces without a slot")
            if any(one.doomed or piece not in one.landed for piece in one.loose()) or (one.idle and not one.slots):
                raise InvariantError(f"{name} keeps slots without bytes that nothing refers to: {one}")
