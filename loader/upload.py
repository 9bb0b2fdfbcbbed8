"""DRAM -> device, in the worker: as views into the pool, or as copies into the device's arena.

One thread per device does what takes time, in few long calls that release the GIL: it takes the page faults of views,
or copies. What somebody waits for goes before the next part of what nobody does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Map

import torch

from serverless_llm.domain import CheckpointId
from serverless_llm.loader import plan
from serverless_llm.loader.converted import Conversion
from serverless_llm.loader.digest import Due
from serverless_llm.loader.headroom import headroom
from serverless_llm.loader.memory import Range
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.pinned import Order, Pinned
from serverless_llm.loader.plan import PAGE, Landed
from serverless_llm.loader.pool import HUGE_PAGE, MAX_SLOT, slot_size
from serverless_llm.loader.sharing import NOTHING, Lent
from serverless_llm.loader.stitched import Kept, Stitched
from serverless_llm.loader.tasks import Mapping, Progress, Read, Task, Upload
from serverless_llm.loader.toucher import MARGIN
from serverless_llm.loader.turns import Turns
from serverless_llm.loader.ways import ByCpu, Way

IDLE = 0.1  # seconds without work after which a discarded mapping is unmapped further; pieces of a load come faster
PAUSE = 2.0  # seconds; as long as the agent waits before it takes memory ahead of need
FLYING = 8  # parts on their way to a device, at most: enough to keep it busy, few enough for others to go before
BESIDE = 4 << 20  # bytes of a part while steps run: one that wants the core, or the memory map, waits for one part
REST = 0.2  # as long as such a part took: a load keeps five sixths of its speed, and steps get their core back


class Uploader:
    """One device's thread, and its window on the whole pool. An error in the thread goes to `threading.excepthook`.

    Attributes:
        step_due: the device computes, or is about to. Set by its owner, at any time.
        longest: bytes of a part.

    Args:
        pool_fd: the pool's memfd; the caller may close it after the last `mapping`.
        pool_bytes: the pool's capacity.
        rate: cap in bytes per second, 0 for none.
        way: how parts get to the device, made from the window.
        on_pinned: called from the thread when more or less of the pool is registered with the device, with the bytes
            that are, and with why no more can be, "" otherwise.
        pause: seconds without a load or a step before any is; `clock` tells them.
        room: bytes of memory that are left to this process.
    """

    def __init__(
        self,
        pool_fd: int,
        pool_bytes: int,
        rate: float = 0.0,
        way: Callable[[Range], Way] = ByCpu,
        on_pinned: Callable[[int, str], None] = lambda nbytes, refused: None,
        pause: float = PAUSE,
        clock: Callable[[], float] = time.monotonic,
        room: Callable[[], int] = headroom,
    ) -> None:
        self.pool_fd = pool_fd
        self.slot_bytes = slot_size(pool_bytes)
        self.window = Range(pool_bytes, self.alignment)
        self.window.place(0, pool_bytes, pool_fd, 0)
        self.way = way(self.window)
        self.pinned = Pinned(pool_bytes)
        self._on_pinned = on_pinned
        self._pause = pause
        self._clock = clock
        self._room = room
        self._quiet_at = 0.0  # seconds of the clock
        self.pacer = Pacer(rate)
        self.longest = plan.paced(rate, MAX_SLOT)
        self._turns: Turns[Task] = Turns()
        self._flying: deque[Task] = deque()  # by their flights, in order
        self._loading: set[Task] = set()
        self._discarded: list[Stitched] = []
        self.step_due = False
        self._closed = False
        self._wake = threading.Condition()  # guards _turns, _closed and `pinned.punched`; told when there is more to do
        self.kept = Kept(pool_bytes, self.discard)
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def alignment(self) -> int:
        """Of a range that shows slots: huge pages want their own size."""
        return HUGE_PAGE if self.slot_bytes >= HUGE_PAGE else PAGE

    def mapping(
        self, checkpoint: CheckpointId, sizes: Sequence[int], on_progress: Progress, lent: Lent = NOTHING
    ) -> Mapping:
        """View mode: a checkpoint with files of these sizes, in the mapping kept of it if there is one.

        `lent`: what of it is in files of others.
        """
        return Mapping(self, checkpoint, sizes, on_progress, lent)

    def upload(
        self,
        sizes: Sequence[int],
        on_progress: Progress,
        on_read: Read | None = None,
        due: Due | None = None,
        lent: Lent = NOTHING,
    ) -> Upload:
        """Copy mode: a checkpoint with files of these sizes; `lent` as for `mapping`.

        `due`: which blocks' copies are compared.
        """
        return Upload(self, sizes, on_progress, on_read, due, lent)

    def conversion(
        self, mapping: Mapping, targets: Map[str, torch.Tensor], on_progress: Progress, due: Due | None = None
    ) -> Conversion:
        """What of a complete mapping the device holds otherwise: see `Converted`."""
        return Conversion(self, mapping.stored(), targets, on_progress, due)

    def close(self) -> None:
        """Drops what is queued and ends the thread."""
        self.pacer.stop()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def put(self, task: Task, span: Landed, whole: bool = False) -> None:
        """Has the task begin the span, in parts; `whole`: at once, for nothing is moved. A cap takes time for both."""
        with self._wake:
            self._turns.put(task, span, whole and not self.pacer.rate)
            self._wake.notify()

    def drop(self, task: Task) -> None:
        """What is queued for it is not to be done."""
        with self._wake:
            self._turns.drop(task)

    def discard(self, stitched: Stitched) -> None:
        """Unmaps it when there has been nothing else to do for a while."""
        with self._wake:
            self._discarded.append(stitched)
            self._wake.notify()

    def punched(self, offset: int) -> None:
        """The slot at `offset` of the pool lost its memory; what lands there is added after this."""
        with self._wake:
            self.pinned.punched(offset)
            self._wake.notify()

    def opened(self, task: Task) -> None:
        self._loading.add(task)

    def ended(self, task: Task) -> None:
        """It is complete, or closed. Idempotent."""
        self._loading.discard(task)
        self._quiet_at = self._clock() + self._pause

    def _run(self) -> None:
        while True:
            with self._wake:
                busy = self._turns or self._closed or self._flying or self._wake.wait(IDLE if self._leisure() else None)
                if self._closed:
                    return
                stale = self.pinned.let_go()
                longest = min(BESIDE, self.longest) if self.step_due else self.longest
                turn = self._turns.take(longest) if self._turns else None
            if stale is not None:
                self._settle(0)  # parts of what is not stale of it
                self._pin(stale)
            if turn is not None:
                self._move(*turn)
            elif busy:
                self._settle(max(0, len(self._flying) - 1))
            elif self._discarded:
                self._unmap_some()
            elif order := self._order():
                self._pin(order)

    def _move(self, task: Task, part: Landed) -> None:
        self._settle(FLYING - 1)
        if self.pacer.rate:
            self.pacer.wait(task.crosses(part))
        began = time.monotonic()
        if task.step(part):
            self._flying.append(task)
        while self._flying and self._flying[0].arrived:
            self._flying.popleft().settle()
        if self.step_due:
            time.sleep(REST * (time.monotonic() - began))

    def _settle(self, most: int) -> None:
        """Waits until at most so many parts are on their way."""
        while len(self._flying) > most:
            self._flying.popleft().settle()

    def _leisure(self) -> bool:
        """There may be something to do when there is nothing else to do."""
        return bool(self._discarded or (self.way.pins and self.pinned.due()))

    def _order(self) -> Order | None:
        """To register memory takes long, and a load or a step would wait for it."""
        now = self._clock()
        if self._loading or self.step_due:
            self._quiet_at = now + self._pause
            return None
        if not self.way.pins or now < self._quiet_at:
            return None
        return self.pinned.due(self._room() - MARGIN)

    def _pin(self, order: Order) -> None:
        self.pinned.begin(order)
        if not order.register:
            self.way.unregister(order.offset)
        elif refused := self.way.register(order.offset, order.length):
            self.pinned.refuse(order, refused)
        self._on_pinned(self.pinned.nbytes, self.pinned.refused)

    def _unmap_some(self) -> None:
        one = self._discarded[0]
        if one.release():
            self._discarded.remove(one)  # the last reference unmaps
