"""Computes the digests of blocks in the pool on one thread, off the GIL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool


class Hasher:
    """One thread, which ends with `close`. `pool`: where the blocks are."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._orders: SimpleQueue[tuple[Sequence[Landed], Callable[[list[bytes]], object]] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def hash(self, blocks: Sequence[Landed], done: Callable[[list[bytes]], object]) -> None:
        """`done` is told their digests on the thread, orders one after another."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hasher", daemon=True)
            self._thread.start()
        self._orders.put((blocks, done))

    def close(self) -> None:
        """Waits for the order in hand, if any; nothing is read or called afterwards."""
        self._closed.set()
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        from xxhash import xxh3_128_digest

        while order := self._orders.get():
            if self._closed.is_set():
                return
            blocks, done = order
            done([xxh3_128_digest(self.pool.range(block.pool_offset, block.length)) for block in blocks])
