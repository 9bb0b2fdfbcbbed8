"""DRAM -> device, in the worker: as views into the pool, or as copies into the device's arena.

One thread per device does what takes time, in few long calls that release the GIL: it takes the page faults of views,
or copies. `Mapping` and `Upload` are fed with the same spans, in any order, and tell of their progress alike. What
somebody waits for goes before the next part of what nobody does.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from serverless_llm.domain import CheckpointId
from serverless_llm.loader import header, plan
from serverless_llm.loader.bounce import Bounce
from serverless_llm.loader.copies import Copies
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.header import Header
from serverless_llm.loader.link import Priority
from serverless_llm.loader.memory import Range
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import HUGE_PAGE, MAX_SLOT, slot_size
from serverless_llm.loader.source import PAGE
from serverless_llm.loader.stitched import Kept, Slot, Stitched
from serverless_llm.loader.turns import Turns
from serverless_llm.loader.views import view

Progress = Callable[[int, int], None]  # done, total; in bytes, from the uploader's thread
Read = Callable[[int], None]  # bytes of spans that are read no more, in the order of their coming; from there, too

IDLE = 0.1  # seconds without work after which a discarded mapping is unmapped further; pieces of a load come faster

BESIDE = 4 << 20  # bytes of a part while steps run: one that wants the core, or the memory map, waits for one part
REST = 0.2  # as long as such a part took: a load keeps five sixths of its speed, and steps get their core back


class Uploader:
    """One device's thread, and its window on the whole pool. An error in the thread goes to `threading.excepthook`.

    Attributes:
        step_due: the device computes, or is about to. Set by its owner, at any time.

    Args:
        pool_fd: the pool's memfd; the caller may close it after the last `mapping`.
        pool_bytes: the pool's capacity.
        rate: cap in bytes per second, 0 for none.
    """

    def __init__(self, pool_fd: int, pool_bytes: int, rate: float = 0.0) -> None:
        self.pool_fd = pool_fd
        self.slot_bytes = slot_size(pool_bytes)
        self.window = Range(pool_bytes, self.alignment)
        self.window.place(0, pool_bytes, pool_fd, 0)
        self.pool = torch.frombuffer(self.window.buffer, dtype=torch.uint8)
        self.pacer = Pacer(rate)
        self._bounce: dict[torch.device, Bounce] = {}
        self._longest = plan.paced(rate, MAX_SLOT)
        self._turns: Turns[Task] = Turns()
        self._discarded: list[Stitched] = []
        self.step_due = False
        self._closed = False
        self._wake = threading.Condition()  # guards _turns and _closed; told when there is more to do
        self.kept = Kept(pool_bytes, self.discard)
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def alignment(self) -> int:
        """Of a range that shows slots: huge pages want their own size."""
        return HUGE_PAGE if self.slot_bytes >= HUGE_PAGE else PAGE

    def mapping(self, checkpoint: CheckpointId, sizes: Sequence[int], on_progress: Progress) -> Mapping:
        """View mode: a checkpoint with files of these sizes, in the mapping kept of it if there is one."""
        return Mapping(self, checkpoint, sizes, on_progress)

    def upload(self, sizes: Sequence[int], on_progress: Progress, on_read: Read | None = None) -> Upload:
        """Copy mode: a checkpoint with files of these sizes."""
        return Upload(self, sizes, on_progress, on_read)

    def close(self) -> None:
        """Drops what is queued and ends the thread."""
        self.pacer.stop()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def put(self, task: Task, span: Landed) -> None:
        with self._wake:
            self._turns.put(task, span)
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

    def bounce(self, device: torch.device) -> Bounce:
        """The pinned buffers of a CUDA device; the first call allocates them."""
        if device not in self._bounce:
            self._bounce[device] = Bounce(device)
        return self._bounce[device]

    def _run(self) -> None:
        while True:
            with self._wake:
                busy = self._turns or self._closed or self._wake.wait(IDLE if self._discarded else None)
                if self._closed:
                    return
                longest = min(BESIDE, self._longest) if self.step_due else self._longest
                turn = self._turns.take(longest) if self._turns else None
            if turn is not None:
                self._move(*turn)
            elif not busy:
                self._unmap_some()

    def _move(self, task: Task, part: Landed) -> None:
        self.pacer.wait(part.length)
        began = time.monotonic()
        task.step(part)
        if self.step_due:
            time.sleep(REST * (time.monotonic() - began))

    def _unmap_some(self) -> None:
        one = self._discarded[0]
        if one.release():
            self._discarded.remove(one)  # the last reference unmaps


class Task:
    """What `Mapping` and `Upload` share: a checkpoint's spans on their way to the device.

    `add`, `headers` and the verbs of the two belong to one thread (the worker's loop); `step` to the uploader's.

    Attributes:
        done, total: bytes; a task is ready when they are equal, which is told by exactly one `on_progress`.
        priority: its parts go before those of higher numbers; may be changed at any time.
    """

    def __init__(self, uploader: Uploader, sizes: Sequence[int], on_progress: Progress) -> None:
        self._uploader = uploader
        self._sizes = tuple(sizes)
        self._on_progress = on_progress
        self._heads: list[list[Landed]] = [[] for _ in sizes]  # spans of files whose header is not known yet
        self._headers: dict[int, Header] = {}  # by file
        self._busy = threading.Lock()  # held while the uploader's thread touches memory for this task
        self.priority = Priority.ONLINE
        self.closed = False
        self.done = 0
        self.total = 0

    def headers(self) -> tuple[Header, ...] | None:
        """Of all files; None until their bytes are there.

        Raises:
            CheckpointError: a header that is none.
        """
        for number, size in enumerate(self._sizes):
            if number not in self._headers and not self._parse(number, size):
                return None
        return tuple(self._headers[number] for number in range(len(self._sizes)))

    def step(self, span: Landed) -> None:
        """One part of a span, in the uploader's thread."""
        with self._busy:
            if self.closed:
                return
            moved = self._move(span)
            if self.done + moved == self.total:
                self._drain()
            self.done += moved
        if moved:
            self._on_progress(self.done, self.total)

    def _move(self, span: Landed) -> int:
        """Does the work; returns how many bytes of `total` it was."""
        raise NotImplementedError

    def _drain(self) -> None:
        """Waits until all work is really done."""

    def _stop(self) -> None:
        """When it returns the uploader's thread touches nothing of this task any more."""
        self.closed = True
        self._uploader.drop(self)
        with self._busy:
            pass

    def _note(self, spans: Iterable[Landed]) -> None:
        for span in spans:
            if span.file not in self._headers:
                self._heads[span.file].append(span)

    def _parse(self, number: int, size: int) -> bool:
        prefix = self._read(number, header.PREFIX)
        raw = prefix and self._read(number, header.data_offset(prefix, size))
        if not raw:
            return False
        self._headers[number] = header.parse(raw, size)
        self._heads[number].clear()
        return True

    def _read(self, number: int, stop: int) -> bytes | None:
        """A file's first bytes."""
        parts = plan.locate(self._heads[number], 0, stop)
        if parts is None:
            return None
        window = memoryview(self._uploader.window.buffer)
        return b"".join(window[start : start + length] for start, length in parts)


class Mapping(Task):
    """View mode: every file is one range of address space into which its slots are stitched.

    The views are read-only memory: writing to one kills the process.
    """

    def __init__(
        self, uploader: Uploader, checkpoint: CheckpointId, sizes: Sequence[int], on_progress: Progress
    ) -> None:
        super().__init__(uploader, sizes, on_progress)
        self.total = sum(sizes)
        self._checkpoint = checkpoint
        kept = uploader.kept.take(checkpoint)
        self._stitched = kept or Stitched(sizes, uploader.slot_bytes, uploader.alignment, uploader.pool_fd)
        self._headers = self._stitched.headers
        self._cold: set[Slot] = set()  # slots whose page faults are to be taken

    def add(self, spans: Iterable[Landed]) -> None:
        """These bytes are in the pool: maps their slots, and queues their page faults."""
        spans = sorted(Landed(*span) for span in spans)
        self._note(spans)
        cold = self._stitched.show(spans)
        self._uploader.kept.handed(self._checkpoint, (self._stitched.shown[slot] for slot in cold))
        self._cold |= cold
        for span in self._joined(spans):
            self._uploader.put(self, span)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, once everything is there: views into the pool; those misaligned to their item size are copies.

        Raises:
            CheckpointError: a dtype or a shape that torch has not.
        """
        headers = self.headers()
        assert headers is not None
        return {
            entry.name: view(self._stitched.ranges[number].buffer, entry)
            for number, one in enumerate(headers)
            for entry in one.tensors
        }

    def close(self) -> bool:
        """Gives up the mapping; it is kept if it is complete. True: nothing refers to the pool any more. False: a
        tensor still does (or a cycle that holds one): call again. Not to be called after it was True."""
        self._stop()
        if not self._stitched.unused():
            return False
        if self.done == self.total:
            self._uploader.kept.keep(self._checkpoint, self._stitched)
        else:
            self._uploader.discard(self._stitched)
        del self._stitched
        return True

    def _joined(self, spans: Iterable[Landed]) -> list[Landed]:
        """Sorted spans that follow one another in a file and are equally cold, as one: their places do not matter."""
        runs: list[Landed] = []
        following: tuple[int, int, bool] | None = None  # file, offset and coldness of a span that would go on
        for span in spans:
            file, offset, length, _ = span
            cold = self._is_cold(span)
            if (file, offset, cold) == following:
                first = runs[-1]
                runs[-1] = Landed(file, first.offset, first.length + length, first.pool_offset)
            else:
                runs.append(span)
            following = file, offset + length, cold
        return runs

    def _is_cold(self, span: Landed) -> bool:
        return self._stitched.slot(span) in self._cold

    def _move(self, span: Landed) -> int:
        if self._is_cold(span):
            self._stitched.ranges[span.file].populate(span.offset, span.length)
        return span.length


class Upload(Task):
    """Copy mode: bytes go to their Dests as they land."""

    def __init__(
        self, uploader: Uploader, sizes: Sequence[int], on_progress: Progress, on_read: Read | None = None
    ) -> None:
        super().__init__(uploader, sizes, on_progress)
        self._on_read = on_read
        self._read_bytes = 0
        self._waiting: list[Landed] | None = []  # until `start` tells where they go
        self._copies: Copies | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._bounce: Bounce | None = None

    def add(self, spans: Iterable[Landed]) -> None:
        """These bytes are in the pool, and stay there until they are read, or the task is closed."""
        spans = [Landed(*span) for span in spans]
        self._note(spans)
        if self._waiting is not None:
            self._waiting += spans
            return
        for span in spans:
            self._uploader.put(self, span)

    def start(self, dests: Iterable[Dest], arena: torch.Tensor) -> None:
        """Where the bytes go; `headers` must be there.

        Args:
            arena: [bytes] uint8, contiguous, on a CPU or CUDA device.
        """
        headers = self.headers()
        assert headers is not None
        assert self._waiting is not None
        self._arena = arena
        self._copies = Copies(headers, dests)
        self.total = self._copies.total
        assert self.total
        self._bounce = self._uploader.bounce(arena.device) if arena.is_cuda else None
        waiting, self._waiting = self._waiting, None
        for span in waiting:
            self._uploader.put(self, span)

    def close(self) -> None:
        """Gives up the upload; when it returns the arena is not written any more. Idempotent."""
        self._stop()
        if self._bounce:
            self._bounce.drain()

    def _move(self, span: Landed) -> int:
        assert self._copies is not None
        copies = list(self._copies.of(span))
        if self._bounce:
            self._bounce.move(self._uploader.pool, span, copies, self._arena)
        else:
            for source, target, length in copies:  # on this thread alone: torch's others would spin beside a step's
                ctypes.memmove(self._arena.data_ptr() + target, self._uploader.window.address + source, length)
        self._read_bytes += span.length
        if self._on_read:
            self._on_read(self._read_bytes)
        return sum(copy.length for copy in copies)

    def _drain(self) -> None:
        if self._bounce:
            self._bounce.drain()
