"""One checkpoint's spans on their way to a device, as views into the pool or as copies; `Uploader` moves them.

`Mapping` and `Upload` are fed with the same spans, in any order, and tell of their progress alike.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from serverless_llm.domain import CheckpointId
from serverless_llm.loader import header, plan
from serverless_llm.loader.copies import Copies
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.digest import Due
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.held import Copied, Held
from serverless_llm.loader.link import Priority
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import Lent
from serverless_llm.loader.stitched import Slot, Stitched
from serverless_llm.loader.views import TORCH_DTYPES, misaligned, view
from serverless_llm.loader.ways import HERE, Arrival

if TYPE_CHECKING:
    from serverless_llm.loader.upload import Uploader

Progress = Callable[[int, int], None]  # done, total; in bytes, from the uploader's thread
Read = Callable[[int], None]  # bytes of spans that are read no more, in the order of their coming; from there, too


class Flight(NamedTuple):
    """A part on its way: bytes read from the pool, bytes of `total` moved, and what tells that it has arrived."""

    read: int
    moved: int
    arrival: Arrival


class Stored(NamedTuple):
    """A tensor in a mapping: the number of the file that has it, the tensor there, and that file's bytes."""

    file: int
    entry: TensorEntry
    buffer: Any


class Task:
    """What `Mapping` and `Upload` share: a checkpoint's spans on their way to the device.

    `add`, `headers` and the verbs of the two belong to one thread (the worker's loop); `step` to the uploader's.

    Attributes:
        done, total: bytes; a task is ready when they are equal, which is told by exactly one `on_progress`. What is
            compared counts once more.
        priority: its parts go before those of higher numbers; may be changed at any time.
        held: what is compared, and was found; None where nothing is.
    """

    def __init__(self, uploader: Uploader, sizes: Sequence[int], on_progress: Progress, lent: Lent) -> None:
        self._uploader = uploader
        self._sizes = tuple(sizes)
        self._lent = lent
        self._on_progress = on_progress
        self._heads: list[list[Landed]] = [[] for _ in sizes]  # spans of files whose header is not known yet
        self._headers: dict[int, Header] = {}  # by file
        self._flights: deque[Flight] = deque()
        self._busy = threading.Lock()  # held while the uploader's thread touches memory for this task, or _flights
        self.priority = Priority.ONLINE
        self.held: Held | None = None
        self.closed = False
        self.done = 0
        self.total = 0
        uploader.opened(self)

    def headers(self) -> tuple[Header, ...] | None:
        """Of all files; None until their bytes are there.

        Raises:
            CheckpointError: a header that is none.
        """
        for number, size in enumerate(self._sizes):
            if number not in self._headers and not self._parse(number, size):
                return None
        return tuple(self._headers[number] for number in range(len(self._sizes)))

    def step(self, part: Landed) -> bool:
        """Begins one part, in the uploader's thread; False: it is closed."""
        with self._busy:
            if not self.closed:
                self._flights.append(self._begin(part))
            return not self.closed

    def crosses(self, part: Landed) -> int:
        """Bytes of it that cross the link."""
        return part.length

    @property
    def arrived(self) -> bool:
        """Whether the oldest flight has."""
        return not self._flights or self._flights[0].arrival.query()

    def settle(self) -> None:
        """The oldest flight: waits for it, and tells of it."""
        with self._busy:
            flight = self._flights[0] if self._flights else None
        if flight is None:
            return  # it is closed
        flight.arrival.synchronize()
        with self._busy:
            if not self._flights:
                return
            self._flights.popleft()
            self.done += flight.moved
            if self.done == self.total:
                self.total += self._compare()
        if flight.moved and self.done == self.total:
            self._uploader.ended(self)
        self._tell(flight)

    def _tell(self, flight: Flight) -> None:
        if flight.moved:
            self._on_progress(self.done, self.total)

    def _begin(self, part: Landed) -> Flight:
        """Does the work, or begins it."""
        raise NotImplementedError

    def _compare(self) -> int:
        """Queues what is to be compared, now that all has arrived; returns its bytes."""
        if self.held is None:
            return 0
        for part in self.held.noted:
            self._uploader.put(self, part)
        return self.held.owed

    def _stop(self) -> None:
        """When it returns the uploader's thread touches nothing of this task any more."""
        self.closed = True
        self._uploader.drop(self)
        self._uploader.ended(self)
        with self._busy:
            for flight in self._flights:
                flight.arrival.synchronize()
            self._flights.clear()

    def _note(self, spans: Iterable[Landed]) -> None:
        for span in spans:
            if span.file < len(self._sizes) and span.file not in self._headers:
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
        self, uploader: Uploader, checkpoint: CheckpointId, sizes: Sequence[int], on_progress: Progress, lent: Lent
    ) -> None:
        super().__init__(uploader, sizes, on_progress, lent)
        self.total = lent.total or sum(sizes)
        self._checkpoint = checkpoint
        shown = [*sizes, *lent.sizes]
        kept = uploader.kept.take(checkpoint)
        if kept is not None and kept.sizes != shown:  # it borrowed from others
            uploader.discard(kept)
            kept = None
        self._stitched = kept or Stitched(shown, uploader.slot_bytes, uploader.alignment, uploader.pool_fd)
        self._headers = self._stitched.headers
        self._cold: set[Slot] = set()  # slots whose page faults are to be taken

    def add(self, spans: Iterable[Landed]) -> None:
        """These bytes are in the pool: maps their slots, and queues their page faults."""
        spans = sorted(Landed(*span) for span in spans)
        self._note(spans)
        cold = self._stitched.show(spans)
        own = (slot for slot in cold if slot[0] < len(self._sizes))
        self._uploader.kept.handed(self._checkpoint, (self._stitched.shown[slot] for slot in own))
        self._cold |= cold
        for span in self._joined(spans):
            self._uploader.put(self, span, whole=not self._is_cold(span))

    def tensors(self, but: Container[str] = ()) -> dict[str, torch.Tensor]:
        """All tensors but these, once everything is there: views into the pool; of misaligned ones, copies.

        Raises:
            CheckpointError: a dtype or a shape that torch has not.
        """
        return {one.entry.name: view(one.buffer, one.entry) for one in self.stored() if one.entry.name not in but}

    def misaligned(self, but: Container[str]) -> dict[str, torch.Tensor]:
        """Room for copies of those, but these, that cannot be viewed; once everything is there."""
        entries = [one.entry for one in self.stored() if one.entry.name not in but and misaligned(one.entry)]
        return {entry.name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for entry in entries}

    def stored(self) -> Iterator[Stored]:
        """All tensors, once everything is there."""
        headers = self.headers()
        assert headers is not None
        for number, one in enumerate(headers):
            for entry in one.tensors:
                file, there = self._lent.find(number, entry)
                yield Stored(file, there, self._stitched.ranges[file].buffer)

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
        if self._cold:
            spans = [part for span in spans for part in self._stitched.cut(span)]
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

    def _begin(self, part: Landed) -> Flight:
        if self._is_cold(part):
            self._stitched.ranges[part.file].populate(part.offset, part.length)
        return Flight(part.length, part.length, HERE)


class Upload(Task):
    """Copy mode: bytes go to their Dests as they land."""

    def __init__(
        self,
        uploader: Uploader,
        sizes: Sequence[int],
        on_progress: Progress,
        on_read: Read | None,
        due: Due | None,
        lent: Lent,
    ) -> None:
        super().__init__(uploader, sizes, on_progress, lent)
        self._on_read = on_read
        self._due = due
        self._copied: Copied | None = None
        self._read_bytes = 0
        self._waiting: list[Landed] | None = []  # until `start` tells where they go
        self._copies: Copies | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)

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
        """Where the bytes go; `headers` must be there. Without `dests` no progress is told of.

        Args:
            arena: [bytes] uint8, contiguous, on a CPU or CUDA device.
        """
        headers = self.headers()
        assert headers is not None
        assert self._waiting is not None
        self._arena = arena
        self._copies = Copies(headers, dests, self._lent)
        self.total = self._copies.total
        if self._due:
            pool = torch.frombuffer(self._uploader.window.buffer, dtype=torch.uint8)
            again = self._on_read is None
            self.held = self._copied = Copied(self._copies, pool, arena, self._sizes, self._due, again)
        waiting, self._waiting = self._waiting, None
        for span in waiting:
            self._uploader.put(self, span)

    def close(self) -> None:
        """Gives up the upload; when it returns the arena is not written any more. Idempotent."""
        self._stop()

    def crosses(self, part: Landed) -> int:
        assert self._copies is not None
        return sum(copy.length for copy in self._copies.of(part))

    def _begin(self, part: Landed) -> Flight:
        if self._copied:
            if part in self._copied.noted:  # such parts fit any turn: they come whole
                return Flight(0, self._copied.compare(part), HERE)
            self._copied.note(part)
        assert self._copies is not None
        copies = list(self._copies.of(part))
        pinned = self._uploader.pinned
        pinned.crossed(part.pool_offset, part.length)
        direct = pinned.direct(part.pool_offset, part.length)
        arrival = self._uploader.way.begin(part, copies, self._arena, direct)
        return Flight(part.length, sum(copy.length for copy in copies), arrival)

    def _tell(self, flight: Flight) -> None:
        self._read_bytes += flight.read
        if self._on_read and flight.read:
            self._on_read(self._read_bytes)
        super()._tell(flight)
