"""The memory of free slots: taken ahead of need while nothing is read, given back where it is more than is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable

from serverless_llm.loader.pool import Pool
from serverless_llm.loader.residency import Tier
from serverless_llm.loader.toucher import Toucher


class Ahead:
    """Makes as many slots ready as the tier wants. `post` runs a callable on the owner's thread.

    Args:
        pause: seconds after `rest` in which no memory is taken.
        idle: whether nothing is read: who reads has the memory's bandwidth to himself.
    """

    def __init__(
        self,
        pool: Pool,
        tier: Tier,
        post: Callable[[Callable[[], None]], object],
        pause: float,
        idle: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._tier = tier
        self._post = post
        self._pause = pause
        self._idle = idle
        self._toucher = Toucher(pool)
        self._trimming = False  # a slot is being made ready, or `trim` is posted
        self._quiet_at = 0.0  # monotonic seconds
        self._closed = False

    def rest(self) -> None:
        """Something was loaded."""
        self._quiet_at = time.monotonic() + self._pause

    @property
    def rested(self) -> bool:
        """The pause is over."""
        return time.monotonic() >= self._quiet_at

    def trim(self) -> None:
        """Takes or gives back the memory of one slot, and so on until the tier has as much as it wants, or there is no
        more: then the next load begins anew."""
        if self._trimming or self._closed:
            return
        if (slot := self._tier.shrink()) is not None:
            self._trimming = True
            self._pool.punch([slot])  # one in a turn of the loop: many gigabytes take seconds
            self._post(lambda: self._trimmed(True))
        elif self._idle() and (slot := self._tier.grow()) is not None:
            self._trimming = True
            delay = max(0.0, self._quiet_at - time.monotonic())
            self._toucher.touch(slot, delay, lambda room: self._post(lambda: self._trimmed(room)))

    def close(self) -> None:
        """Before the pool is closed: no memory is taken or given back any more."""
        self._closed = True
        self._toucher.close()

    def _trimmed(self, more: bool) -> None:
        self._trimming = False
        if more:
            self.trim()
