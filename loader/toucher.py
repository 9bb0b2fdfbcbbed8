"""Takes the memory of pool slots ahead of need, on a thread of its own that leaves most of a core to others.

Never at a lower priority: the kernel holds the process's memory map locked meanwhile, and every thread waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from serverless_llm.loader.pool import Pool

REST = 3.0  # times as long as a slot took


class Toucher:
    """One thread, which ends with `close`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._orders: SimpleQueue[tuple[int, float, Callable[[], object]] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="toucher", daemon=True)
        self._thread.start()

    def touch(self, slot: int, delay: float, done: Callable[[], object]) -> None:
        """Touches the slot after `delay` seconds; `done` is called on the thread afterwards."""
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
            self._pool.touch(slot)
            if self._closed.wait(REST * (time.monotonic() - began)):
                return
            done()
