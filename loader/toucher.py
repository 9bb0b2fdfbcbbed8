"""Takes the memory of pool slots ahead of need, on a thread of its own.

Never at a lower priority: the kernel holds the process's memory map locked meanwhile, and every thread waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from serverless_llm.loader.pool import Pool


class Toucher:
    """One thread, which ends with `close`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._orders: SimpleQueue[tuple[int, Callable[[], object]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="toucher", daemon=True)
        self._thread.start()

    def touch(self, slot: int, done: Callable[[], object]) -> None:
        """Touches the slot; `done` is called on the thread afterwards."""
        self._orders.put((slot, done))

    def close(self) -> None:
        """Waits for the slot in hand, if any."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while order := self._orders.get():
            slot, done = order
            self._pool.touch(slot)
            done()
