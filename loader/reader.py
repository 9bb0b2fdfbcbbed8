"""Disk -> pool: a few threads around `preadv`, which release the GIL while the device works.

O_DIRECT scattered straight into slots, in calls of up to 64 MiB, unless the bytes are in the page cache already. All
transfers share one queue: by priority, then first come; a better one goes before the next call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import plan
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.source import PAGE, OpenFile, SourceFile

CALL_BYTES = 64 << 20  # longer calls gain nothing; shorter ones suffer when a Python thread is busy


class Batch(NamedTuple):
    """News of a transfer, from a reader thread.

    Attributes:
        landed: spans whose bytes are in the pool.
        disk_bytes, cache_bytes: where they came from.
        last: nothing of this transfer is in flight or will be: its slots are written no more.
        error: why it ended early; None when all was read, or it was cancelled.
    """

    landed: tuple[Landed, ...]
    disk_bytes: int
    cache_bytes: int
    last: bool
    error: CheckpointError | None


@dataclass(eq=False, slots=True)
class Transfer:
    """Pieces of one checkpoint, to be read into their slots.

    `deliver` is called from reader threads, one call at a time, with `last` in the last one; it must not block.
    `priority`: lower goes first. `started`, `ended`: monotonic seconds of its first and last read, 0 before.
    """

    files: Sequence[SourceFile]
    slots: dict[Piece, int]
    pieces: Sequence[Piece]
    deliver: Callable[[Batch], None]
    priority: int = 0
    started: float = 0.0
    ended: float = 0.0
    _calls: deque[tuple[Piece, ...]] = field(default_factory=deque)
    _flying: int = 0
    _error: CheckpointError | None = None
    _opened: dict[int, OpenFile] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards _opened and the order of deliveries


class Reader:
    """`threads` threads, which end with `close`. `rate`: cap in bytes per second, 0 for none."""

    def __init__(self, pool: Pool, threads: int = 2, rate: float = 0.0) -> None:
        self.rate = rate
        self._pool = pool
        self._pacer = Pacer(rate)
        self._call_bytes = plan.paced(rate, CALL_BYTES)
        self._queue: list[Transfer] = []
        self._wake = threading.Condition()  # guards _queue, and _calls and _flying of all in it
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer) -> None:
        """Queues a transfer; it ends with a `Batch` whose `last` is set."""
        transfer._calls.extend(plan.reads(transfer.pieces, self._call_bytes))
        with self._wake:
            place = sum(other.priority <= transfer.priority for other in self._queue)
            self._queue.insert(place, transfer)
            self._wake.notify_all()

    def cancel(self, transfer: Transfer) -> None:
        """Begins no more reads of it; `last` comes when those in flight have returned. Idempotent."""
        with self._wake:
            transfer._calls.clear()
            if transfer in self._queue:  # ends before others begin
                self._queue.remove(transfer)
                self._queue.insert(0, transfer)
            self._wake.notify_all()

    def close(self) -> None:
        """Waits for the reads in flight; what is queued is dropped without news."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._pacer.stop()
        for thread in self._threads:
            thread.join()
        for transfer in self._queue:
            for file in transfer._opened.values():
                file.close()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            transfer, call = taken
            batch = self._read(transfer, call)
            with transfer._lock:
                self._conclude(transfer, batch)

    def _take(self) -> tuple[Transfer, tuple[Piece, ...]] | None:
        """The next call of the first transfer that has one; () ends a transfer that has none left. None: closed."""
        with self._wake:
            while not self._closed:
                for transfer in self._queue:
                    if transfer._calls or not transfer._flying:
                        transfer._flying += 1
                        return transfer, transfer._calls.popleft() if transfer._calls else ()
                self._wake.wait()
        return None

    def _read(self, transfer: Transfer, call: tuple[Piece, ...]) -> Batch:
        nothing = Batch((), 0, 0, False, None)
        if not call:
            return nothing
        nbytes = sum(span.length for span in call)
        transfer.started = transfer.started or time.monotonic()
        self._pacer.wait(nbytes)
        try:
            cached = _opened(transfer, call[0].file).read(self._buffers(transfer, call), call[0].offset, nbytes)
        except CheckpointError as error:
            # a new error: the traceback of this one would keep the pool's buffers
            return nothing._replace(error=type(error)(str(error)))
        landed = tuple(Landed(span.file, span.offset, span.length, self._place(transfer, span)) for span in call)
        return Batch(landed, 0 if cached else nbytes, nbytes if cached else 0, False, None)

    def _conclude(self, transfer: Transfer, batch: Batch) -> None:
        """Delivers the batch. Caller holds the transfer's lock, so that `last` overtakes nothing."""
        transfer._error = transfer._error or batch.error
        with self._wake:
            if transfer._error:
                transfer._calls.clear()
            transfer._flying -= 1
            last = not transfer._calls and not transfer._flying
            if last:
                self._queue.remove(transfer)
        if last:
            transfer.ended = time.monotonic()
            changed = _close(transfer)
            transfer.deliver(batch._replace(last=True, error=transfer._error or changed))
        elif batch.landed:
            transfer.deliver(batch)

    def _place(self, transfer: Transfer, span: Piece) -> int:
        """Where a span goes in the pool."""
        piece = plan.home(span, transfer.files[span.file].size, self._pool.slot_bytes)
        return self._pool.offset(transfer.slots[piece]) + span.offset - piece.offset

    def _buffers(self, transfer: Transfer, call: tuple[Piece, ...]) -> list[memoryview]:
        """Where the call's bytes go. The tail of a file is rounded up to whole pages, as O_DIRECT wants."""
        places = [(self._place(transfer, span), -(-span.length // PAGE) * PAGE) for span in call]
        return [self._pool.range(place, length) for place, length in places]


def _opened(transfer: Transfer, number: int) -> OpenFile:
    with transfer._lock:
        if number not in transfer._opened:
            transfer._opened[number] = OpenFile(transfer.files[number])
        return transfer._opened[number]


def _close(transfer: Transfer) -> CheckpointError | None:
    """Closes the files; the error of one that was changed while it was read."""
    error = None
    for file in transfer._opened.values():
        try:
            file.check()
        except CheckpointError as changed:
            error = changed
        file.close()
    return error
