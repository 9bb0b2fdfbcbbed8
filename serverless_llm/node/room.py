"""Room in the DRAM tier for an agent's replicas: their loads' reservations, and the waiting for those."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from serverless_llm.errors import CapacityError, TransientError
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import Loan
from serverless_llm.loader.waiting import Load
from serverless_llm.node.replica import Replica
from serverless_llm.node.sharing import Sharing


class Room:
    """Used on the agent's loop only.

    Args:
        replicas: all of the agent, by number.
        copies: whether a device has weights of its own, so that what it copied may leave the pool.
        arrived: told of what landed for a replica, as `Load.on_landed`.
        failed: told why a replica's load ended, and whether for good.
        waits: told of a replica that finds no room by now.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sharing: Sharing,
        replicas: Mapping[int, Replica],
        copies: Callable[[int], bool],
        arrived: Callable[[Replica, Sequence[Landed], bool], None],
        failed: Callable[[int, str, bool], None],
        waits: Callable[[int], None],
    ) -> None:
        self._pipeline = pipeline
        self._sharing = sharing
        self._replicas = replicas
        self._copies = copies
        self._arrived = arrived
        self._failed = failed
        self._waits = waits

    async def reserve(self, replica: Replica, found: Manifest) -> Load:
        """Waits for room as long as others are to give some back.

        Raises:
            CapacityError: there is none, and will not be.
        """
        while True:
            replica.reserved = time.monotonic()
            try:
                return self.load(replica, found)
            except CapacityError:
                under_way = any(one.load and (one.dropping or not one.ready) for one in self._replicas.values())
                returning = under_way or self._pipeline.settling
                if not returning or not self.fits(replica, found):
                    raise
            self._waits(replica.order.replica)
            replica.room = asyncio.get_running_loop().create_future()
            await replica.room

    def look_again(self) -> None:
        """There may be room: those who wait for it try again, the most urgent first, in the order of their starts."""
        for replica in sorted(self._replicas.values(), key=lambda one: one.priority):
            if replica.room is not None:
                replica.room.set_result(None)
                replica.room = None

    def fits(self, replica: Replica, found: Manifest) -> bool:
        """Whether there would be room if it were the only one."""
        return self._pipeline.fits(found, self._copies(replica.order.device))

    def load(self, replica: Replica, found: Manifest) -> Load:
        """Reserves what the replica needs. What is verified, or comes from a server, is read whatever others
        have.

        Raises:
            CapacityError: as `Pipeline.load`.
        """
        plain = replica.order.verify == "off" and replica.origin is None
        loan = self._sharing.loan(found) if plain else None
        try:
            return self._load_with(replica, found, loan)
        except CapacityError:
            if loan is None:
                raise
            return self._load_with(replica, found, None)  # what lends must stay; alone there may be room

    def _load_with(self, replica: Replica, found: Manifest, loan: Loan | None) -> Load:
        order = replica.order
        return self._pipeline.load(
            found,
            order.replica,
            lambda spans, last: self._arrived(replica, spans, last),
            lambda error: self._failed(order.replica, str(error), not isinstance(error, TransientError)),
            replica.priority,
            ring=self._copies(order.device),
            origin=replica.origin,
            loan=loan,
        )
