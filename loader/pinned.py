"""Which chunks of the pool are registered with a device as pinned, and which one is next. Pure.

A registered chunk keeps the memory that it had. When the agent gives a slot's memory back, the slot has new memory at
its next use, and the device goes on seeing the old one: such a chunk is stale from then on, and nothing is copied
straight from it before it was unregistered and registered anew. The old memory is free once it is unregistered.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

CHUNK = 1 << 30  # bytes; registering one takes some tenths of a second


class Order(NamedTuple):
    """One chunk to be registered, or else unregistered."""

    offset: int
    length: int
    register: bool


class Pinned:
    """The books of one device's registrations; `refused`: why there are no more, "" while there may be.

    `punched` belongs to the thread that feeds the one that copies: what landed in a slot after it was punched is fed
    after that. All else belongs to the one that copies.
    """

    def __init__(self, pool_bytes: int, chunk_bytes: int = CHUNK) -> None:
        self._pool_bytes = pool_bytes
        self._chunk_bytes = chunk_bytes
        self._crossed = [0] * -(-pool_bytes // chunk_bytes)  # bytes by chunk, since it was last unregistered
        self._registered: set[int] = set()
        self._stale: set[int] = set()
        self.refused = ""

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(self._length(chunk) for chunk in self._registered)

    def crossed(self, offset: int, length: int) -> None:
        """Bytes of the pool went to the device: what is used often is worth the most."""
        self._crossed[offset // self._chunk_bytes] += length

    def direct(self, offset: int, length: int) -> bool:
        """Whether the device may copy these bytes of the pool by itself."""
        chunks = set(range(offset // self._chunk_bytes, -(-(offset + length) // self._chunk_bytes)))
        return chunks <= self._registered and chunks.isdisjoint(self._stale)

    def let_go(self) -> Order | None:
        """The next stale chunk, to be unregistered at any time: the memory beneath it counts beside the pool's."""
        return self._order(min(self._stale), register=False) if self._stale else None

    def due(self, room: int = sys.maxsize) -> Order | None:
        """What is to be done next, when there is time: stale chunks let go, then the hottest registered.

        What nothing has crossed stays as it is: to register memory is to take it. So does all where there is none to
        be taken: of `room` bytes at most.
        """
        if self._stale:
            return self.let_go()
        free = [chunk for chunk, heat in enumerate(self._crossed) if heat and chunk not in self._registered]
        if self.refused or not free:
            return None
        order = self._order(max(free, key=self._crossed.__getitem__), register=True)
        return order if order.length <= room else None

    def begin(self, order: Order) -> None:
        """To be said before it is done: what is punched meanwhile is stale."""
        chunk = order.offset // self._chunk_bytes
        if order.register:
            self._registered.add(chunk)
        else:
            self._registered.discard(chunk)
            self._stale.discard(chunk)
            self._crossed[chunk] = 0

    def refuse(self, order: Order, why: str) -> None:
        """A registration that was begun failed; nothing is registered any more."""
        self.refused = why
        self._registered.discard(order.offset // self._chunk_bytes)
        self._stale.discard(order.offset // self._chunk_bytes)

    def punched(self, offset: int) -> None:
        """The memory of the slot at `offset` was given back."""
        chunk = offset // self._chunk_bytes
        if chunk in self._registered:
            self._stale.add(chunk)

    def _order(self, chunk: int, register: bool) -> Order:
        return Order(chunk * self._chunk_bytes, self._length(chunk), register)

    def _length(self, chunk: int) -> int:
        return min(self._chunk_bytes, self._pool_bytes - chunk * self._chunk_bytes)
