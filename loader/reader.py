"""Disk -> pool: a few threads around `preadv`, which release the GIL while the device works.

O_DIRECT scattered straight into slots, in calls of up to 32 MiB, or, where the pool's pages are small, through a buffer
of huge ones; the page cache is used for bytes that are there already. All transfers share one queue, by rank; a better
one goes before the next call. So what nobody waits for is read in shorter calls. While headers are read for a load that
somebody waits for, nothing is read that ranks after it: such small reads would wait behind whole calls in the device's
queue, and a later load, whose headers were read sooner, would go first.

A read may hang for ever in the kernel (a dying disk, a network mount). It keeps its thread and its slots until it
returns; its transfer begins no other read meanwhile, and a fresh thread takes its place, so that others are read.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import plan
from serverless_llm.loader.link import Priority, Rank
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.plan import PAGE, Landed, Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.source import Came, Opened, Source
from serverless_llm.loader.staging import Staging, pays

CALL_BYTES = 32 << 20  # longer calls gain little; shorter ones suffer when a Python thread is busy
THREADS = 4
STAGED_CALL_BYTES = 8 << 20
BRIEF = 2  # calls of what nobody waits for are so many times shorter; arbitrary: those in flight are over in 25 ms
STAGED_THREADS = 12  # some copy while others read
STUCK_S = 5.0  # after which a read counts as stuck: less than the control plane waits for the loads queued behind it
ENDING = Rank(-sys.maxsize)  # of what is cancelled: it ends before others begin
MOST_STUCK = 16  # stuck reads that are replaced, each a thread; arbitrary
log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """News of a transfer, from a reader thread.

    Attributes:
        landed: spans whose bytes are in the pool.
        came: where these bytes were.
        last: nothing of this transfer is in flight or will be: its slots are written no more.
        error: why it ended early; None when all was read, or it was cancelled.
    """

    landed: tuple[Landed, ...]
    came: Came
    last: bool
    error: CheckpointError | None


@dataclass(eq=False, slots=True)
class Transfer:
    """Pieces of one checkpoint, to be read into their slots.

    `deliver` is called from reader threads, one call at a time, with `last` in the last one; it must not block.
    `rank`: lower goes first. `started`, `ended`: monotonic seconds of its first and last read, 0 before.
    `busy`: seconds with a read of it under way: others may go before it in between.
    """

    files: Sequence[Source]
    slots: dict[Piece, int]
    pieces: Sequence[Piece]
    deliver: Callable[[Batch], None]
    rank: Rank = field(default_factory=Rank)
    started: float = 0.0
    ended: float = 0.0
    busy: float = 0.0
    _busy_since: float = 0.0
    _spans: deque[Piece] = field(default_factory=deque)  # that no call has yet
    _due: Counter[int] = field(default_factory=Counter)  # bytes by file, those in flight too
    _flying: int = 0
    _error: CheckpointError | None = None
    _told: bool = False  # of a stuck read; a slow disk has many
    _opened: dict[int, Opened] = field(default_factory=dict)  # each from its first call to its last one
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards _opened and the order of deliveries


@dataclass(eq=False, slots=True)
class _Read:
    """A call that a thread took; the system is busy with it since `began` (monotonic seconds)."""

    transfer: Transfer
    call: tuple[Piece, ...]
    began: float = math.inf
    stuck: bool = False


class Reader:
    """`threads` threads (0: as many as are best), and one that watches them; they end with `close`.

    `rate`: cap in bytes per second, 0: none. `staged`: read through `Staging`; None: where it pays. `stuck_s`: seconds
    after which a read counts as stuck, 0: those of a disk.
    """

    def __init__(
        self,
        pool: Pool,
        threads: int = 0,
        rate: float = 0.0,
        staged: bool | None = None,
        stuck_s: float = 0.0,
    ) -> None:
        self.rate = rate
        self._pool = pool
        self._pacer = Pacer(rate)
        self._stuck_s = stuck_s or STUCK_S
        self._staged = pays(pool.pages) and not rate if staged is None else staged
        self._size = threads or (STAGED_THREADS if self._staged else THREADS)
        longest = STAGED_CALL_BYTES if self._staged else CALL_BYTES
        self._call_bytes = plan.paced(rate / self._size, longest)
        self._awaited: set[int] = set()
        self._queue: list[Transfer] = []
        self._reads: list[_Read] = []
        self._wake = threading.Condition()  # guards _awaited, _queue, its _spans, _due and _flying, _reads, _threads
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._watcher = threading.Thread(target=self._watch, name="reader-watch", daemon=True)
        try:
            for _ in range(self._size):
                self._hire()
            self._watcher.start()
        except RuntimeError:  # the system has no more
            with self._wake:
                self._closed = True
                self._wake.notify_all()
            raise

    def submit(self, transfer: Transfer) -> None:
        """Queues a transfer; it ends with a `Batch` whose `last` is set."""
        transfer._spans = deque(transfer.pieces)
        for piece in transfer.pieces:
            transfer._due[piece.file] += piece.length
        with self._wake:
            self._enqueue(transfer)

    def yield_to(self, number: int) -> None:
        """What ranks after this replica begins no read until `go_on`: one that somebody waits for is about to come."""
        with self._wake:
            self._awaited.add(number)

    def go_on(self, number: int) -> None:
        """It came, or will not. Idempotent."""
        with self._wake:
            if number in self._awaited:
                self._awaited.remove(number)
                self._wake.notify_all()

    def rank(self, transfer: Transfer, rank: Rank) -> None:
        """Gives it another rank, from its next read on; what has none left stays as it is."""
        with self._wake:
            if transfer._spans and rank != transfer.rank:
                self._move(transfer, rank)

    def cancel(self, transfer: Transfer) -> None:
        """Begins no more reads of it; `last` comes when those in flight have returned. Idempotent."""
        with self._wake:
            transfer._spans.clear()
            if transfer in self._queue:
                self._move(transfer, ENDING)

    def close(self) -> bool:
        """Waits for the reads in flight, but not for stuck ones; what is queued is dropped without news. Idempotent.

        Returns:
            False when a read is stuck: it may still write to the pool.
        """
        with self._wake:
            self._closed = True
            self._wake.notify_all()
            threads = [*self._threads, self._watcher]
        self._pacer.stop()
        with self._wake:
            returned = self._wake.wait_for(lambda: not self._reads, STUCK_S)
        if returned:
            for thread in threads:
                thread.join()
            while self._queue:
                for file in self._queue.pop()._opened.values():
                    file.close()
        return returned

    def _move(self, transfer: Transfer, rank: Rank) -> None:
        """Caller holds `_wake`."""
        self._queue.remove(transfer)
        transfer.rank = rank
        self._enqueue(transfer)

    def _enqueue(self, transfer: Transfer) -> None:
        """Caller holds `_wake`."""
        place = sum(other.rank <= transfer.rank for other in self._queue)
        self._queue.insert(place, transfer)
        self._wake.notify_all()

    def _hire(self) -> None:
        thread = threading.Thread(target=self._work, name="reader", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch(self) -> None:
        with self._wake:
            while not self._closed:
                late = time.monotonic() - self._stuck_s
                for read in [read for read in self._reads if not read.stuck and read.began < late]:
                    self._give_up(read)
                self._replace()
                self._wake.wait(self._stuck_s / 4 if self._queue else None)

    def _give_up(self, read: _Read) -> None:
        """Its thread counts no more. Caller holds `_wake`."""
        first = read.call[0] if read.call else Piece(0, 0, 0)
        path = read.transfer.files[first.file].path
        if not read.transfer._told:
            log.warning("%s: a read at byte %d has not returned for %.1f s", path, first.offset, self._stuck_s)
        read.stuck = read.transfer._told = True

    def _replace(self) -> None:
        """Has other threads read for others, as soon as the system has some. Caller holds `_wake`."""
        try:
            while self._surplus() < 0:
                self._hire()
        except RuntimeError as error:
            log.warning("no thread reads in the place of one that is stuck: %s", error)

    def _surplus(self) -> int:
        """Threads that are too many; those in stuck reads do not count."""
        return len(self._threads) - self._size - min(sum(read.stuck for read in self._reads), MOST_STUCK)

    def _work(self) -> None:
        staging = Staging(self._call_bytes) if self._staged else None
        while (read := self._take()) is not None:
            if read.call:
                read.transfer.started = read.transfer.started or time.monotonic()
                self._pacer.wait(sum(span.length for span in read.call))
            read.began = time.monotonic()
            batch = self._read(read.transfer, read.call, staging)
            with read.transfer._lock:
                self._conclude(read, batch)
            with self._wake:
                self._reads.remove(read)
                self._wake.notify_all()  # its transfer may go on

    def _take(self) -> _Read | None:
        """The next call of the first transfer that has one; () ends a transfer that has none left. None: closed, or
        another thread took this one's place."""
        with self._wake:
            while not self._closed and self._surplus() <= 0:
                for transfer in self._queue:
                    if self._may_begin(transfer):
                        if not transfer._flying:
                            transfer._busy_since = time.monotonic()
                        transfer._flying += 1
                        self._reads.append(_Read(transfer, self._next(transfer)))
                        return self._reads[-1]
                self._wake.wait()
            self._threads.remove(threading.current_thread())
        return None

    def _next(self, transfer: Transfer) -> tuple[Piece, ...]:
        """Its next call; () where none is left."""
        if not transfer._spans:
            return ()
        longest = transfer.files[transfer._spans[0].file].longest or self._call_bytes
        if transfer.rank.priority >= Priority.PREFETCH:
            longest = max(PAGE, longest // BRIEF // PAGE * PAGE)
        return plan.take(transfer._spans, longest)

    def _may_begin(self, transfer: Transfer) -> bool:
        """Another read, or its end. Caller holds `_wake`."""
        if not transfer._spans:
            return not transfer._flying
        if self._awaited and transfer.rank > Rank(Priority.ONLINE, min(self._awaited)):
            return False
        return not any(read.stuck and read.transfer is transfer for read in self._reads)

    def _read(self, transfer: Transfer, call: tuple[Piece, ...], staging: Staging | None) -> Batch:
        nothing = Batch((), Came(), False, None)
        if not call:
            return nothing
        nbytes = sum(span.length for span in call)
        try:
            file = _opened(transfer, call[0].file)
            came = file.read(self._buffers(transfer, call), call[0].offset, nbytes, staging)
        except Exception as error:  # noqa: BLE001  the thread's edge: whoever waits is told
            return nothing._replace(error=_anew(transfer.files[call[0].file].path, error))
        landed = tuple(Landed(span.file, span.offset, span.length, self._place(transfer, span)) for span in call)
        return Batch(landed, came, False, None)

    def _conclude(self, read: _Read, batch: Batch) -> None:
        """Delivers the batch. Caller holds the transfer's lock, so that `last` overtakes nothing."""
        transfer = read.transfer
        transfer._error = transfer._error or batch.error or _close(transfer, self._read_whole(read))
        with self._wake:
            if transfer._error:
                transfer._spans.clear()
            transfer._flying -= 1
            if not transfer._flying:
                transfer.busy += time.monotonic() - transfer._busy_since
            last = not transfer._spans and not transfer._flying
            if last:
                self._queue.remove(transfer)
        if last:
            transfer.ended = time.monotonic()
            changed = _close(transfer, [*transfer._opened])
            transfer.deliver(batch._replace(last=True, error=transfer._error or changed))
        elif batch.landed:
            transfer.deliver(batch)

    def _read_whole(self, read: _Read) -> list[int]:
        """The file of a call that was its last one."""
        if not read.call:
            return []
        due, file = read.transfer._due, read.call[0].file
        with self._wake:
            due[file] -= sum(span.length for span in read.call)
            return [] if due[file] else [file]

    def _place(self, transfer: Transfer, span: Piece) -> int:
        """Where a span goes in the pool."""
        piece = plan.home(span, transfer.files[span.file].size, self._pool.slot_bytes)
        return self._pool.offset(transfer.slots[piece]) + span.offset - piece.offset

    def _buffers(self, transfer: Transfer, call: tuple[Piece, ...]) -> list[memoryview]:
        """Where the call's bytes go. The tail of a file is rounded up to whole pages, as O_DIRECT wants."""
        places = [(self._place(transfer, span), -(-span.length // PAGE) * PAGE) for span in call]
        return [self._pool.range(place, length) for place, length in places]


def _opened(transfer: Transfer, number: int) -> Opened:
    with transfer._lock:
        known = transfer._opened.get(number)
    if known is not None:
        return known
    opened = transfer.files[number].open()  # without the lock: it may hang
    with transfer._lock:
        kept = transfer._opened.setdefault(number, opened)
    if kept is not opened:
        opened.close()
    return kept


def _close(transfer: Transfer, files: Iterable[int]) -> CheckpointError | None:
    """Closes these; the error of one that was changed while it was read. Caller holds the transfer's lock."""
    error = None
    for number in files:
        try:
            with closing(transfer._opened.pop(number)) as file:
                file.check()
        except Exception as failure:  # noqa: BLE001  as in `_read`
            error = _anew(transfer.files[number].path, failure)
    return error


def _anew(path: Path | str, error: Exception) -> CheckpointError:
    """An error anew: its traceback would keep the pool's buffers. One that nobody foresaw is logged with its own."""
    if isinstance(error, CheckpointError):
        return type(error)(str(error))
    log.error("%s: %s", path, "".join(traceback.format_exception(error)))
    return TransientError(f"{path}: {type(error).__name__}: {error}")
