"""What servers sent, on its way from the DRAM tier's slots to the disk: these are leased until it is there.

Everything here runs on the thread that owns the tier; the threads that write only `post` to it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

from serverless_llm.domain import CheckpointId, ReplicaId
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.reader import STUCK_S
from serverless_llm.loader.residency import Tier


class _Writing(NamedTuple):
    checkpoint: CheckpointId
    origin: Origin


class Drain:
    """Those of one pool. `post` runs a callable on the owner's thread; `release` ends a lease there."""

    def __init__(
        self,
        tier: Tier,
        post: Callable[[Callable[[], None]], object],
        release: Callable[[CheckpointId, ReplicaId], None],
    ) -> None:
        self._tier = tier
        self._post = post
        self._release = release
        self._writing: dict[ReplicaId, _Writing] = {}  # by holders of their own
        self._giving_up: set[ReplicaId] = set()
        self._numbers = itertools.count(-1, -1)
        self._reading: set[ReplicaId] = set()  # those who refer to slots
        self._closed = False
        self._wake = threading.Condition()  # guards the last two

    @property
    def giving_up(self) -> bool:
        """Leases end though nobody else releases anything."""
        return bool(self._giving_up)

    def begin(self, checkpoint: CheckpointId, origin: Origin) -> None:
        """Leases the checkpoint for what the origin brings."""
        holder = next(self._numbers)
        self._tier.lease(checkpoint, holder)
        self._writing[holder] = _Writing(checkpoint, origin)
        self._reading.add(holder)

        def release() -> None:
            del self._writing[holder]
            self._giving_up.discard(holder)
            self._release(checkpoint, holder)

        def written() -> None:
            with self._wake:
                self._reading.remove(holder)
                self._wake.notify()
                if not self._closed:
                    self._post(release)

        origin.hold(written)

    def reclaim(self) -> None:
        """Others need the room: of what nobody else holds, the disk tier gets the rest another time."""
        for holder, one in self._writing.items():
            if self._tier.holders(one.checkpoint) <= self._writing.keys():
                one.origin.give_up()
                self._giving_up.add(holder)

    def close(self) -> bool:
        """What waits for the disk is dropped, and nothing is posted any more.

        Returns:
            False when the disk keeps a write waiting: it may still read from the pool.
        """
        with self._wake:
            self._closed = True
        for one in self._writing.values():
            one.origin.give_up()
        with self._wake:
            return self._wake.wait_for(lambda: not self._reading, STUCK_S)
