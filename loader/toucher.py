"""Takes the memory of pool slots ahead of need, on a thread of its own that leaves most of a core to others.

None is taken where others would soon miss it: the kernel ends a process of a control group that has no more, perhaps
this one, and whoever takes memory ahead again and again is ended again and again.

Never at a lower priority: the kernel holds the process's memory map locked meanwhile, and every thread waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from serverless_llm.loader.headroom import headroom
from serverless_llm.loader.pool import Pool

REST = 3.0  # times as long as a slot took
MARGIN = 64 << 20  # bytes left to everybody else; arbitrary: some workers more, and the heads of requests


class Toucher:
    """One thread, which ends with `close`. `room`: bytes of memory that are left to this process."""

    def __init__(self, pool: Pool, room: Callable[[], int] = headroom) -> None:
        self._pool = pool
        self._room = room
        self._orders: SimpleQueue[tuple[int, float, Callable[[bool], object]] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="toucher", daemon=True)
        self._thread.start()

    def touch(self, slot: int, delay: float, done: Callable[[bool], object]) -> None:
        """Touches the slot after `delay` seconds; `done` is told on the thread whether there was memory for it."""
        self._orders.put((slot, delay, done))

    def close(self) -> None:
        """Waits for the slot in hand, if any; none is touched afterwards, and nothing is called."""
        self._closed.set()
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while order := self._orders.get():
            slot, delay, done = order
            if self._closed.wait(delay):
                return
            began = time.monotonic()
            room = self._room() >= self._pool.slot_bytes + MARGIN
            if room:
                self._pool.touch(slot)
            if self._closed.wait(REST * (time.monotonic() - began)):
                return
            done(room)
