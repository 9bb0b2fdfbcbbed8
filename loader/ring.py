"""Pieces that find no home in the DRAM tier, on their way to a device through slots that are used again and again.

A slot is read into again when the device has said that it copied what the slot held. Everything here runs on the thread
that owns the tier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from serverless_llm.loader.link import Rank
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.reader import Batch, Reader, Transfer
from serverless_llm.loader.source import Source

PARTS = 4  # of a ring: some are read into while the device copies others


class Ring:
    """`pieces`, in their order, through `slots`.

    Args:
        slot_bytes: of the pool.
        post: runs a callable on the owner's thread.
        told: called there with every batch of news, until `cancel`.
        free: called there, once, with the slots that nothing writes to or reads from any more.

    Attributes:
        started: monotonic seconds of the first read, 0 before.
    """

    def __init__(
        self,
        reader: Reader,
        files: Sequence[Source],
        pieces: Iterable[Piece],
        slots: Sequence[int],
        slot_bytes: int,
        rank: Rank,
        post: Callable[[Callable[[], None]], object],
        told: Callable[[Batch], None],
        free: Callable[[Sequence[int]], None],
    ) -> None:
        self._reader = reader
        self._files = files
        self._left = deque(pieces)
        self._slots = tuple(slots)
        self._ready = deque(slots)
        self._part = max(1, len(slots) // PARTS)
        self._slot_bytes = slot_bytes
        self._rank = rank
        self._post = post
        self._told = told
        self._free = free
        self._flying: list[Transfer] = []
        self._held: dict[int, int] = {}  # bytes of a slot that the device has not copied
        self._shown: deque[tuple[int, Landed]] = deque()  # spans, with all bytes shown up to their end
        self._shown_bytes = 0
        self._cancelled = self._released = False
        self.started = 0.0

    def fill(self) -> None:
        """Reads into whatever is free, in parts of some length."""
        while self._left and len(self._ready) >= min(self._part, len(self._left)):
            slots = {self._left.popleft(): self._ready.popleft() for _ in range(min(self._part, len(self._left)))}
            self._held |= {slot: piece.length for piece, slot in slots.items()}
            self._read(slots)

    def show(self, spans: Iterable[Landed]) -> None:
        """The device is told of these spans, of the ring or not, in this order."""
        for span in spans:
            self._shown_bytes += span.length
            self._shown.append((self._shown_bytes, span))

    def copied(self, nbytes: int) -> None:
        """The device has copied so many bytes of what it was shown, since the beginning and in order."""
        while self._shown and self._shown[0][0] <= nbytes:
            _, span = self._shown.popleft()
            slot = span.pool_offset // self._slot_bytes
            if slot in self._held:
                self._held[slot] -= span.length
                if not self._held[slot]:
                    del self._held[slot]
                    self._ready.append(slot)
        self.fill()

    def hasten(self, rank: Rank) -> None:
        """Its bytes go before those of higher ranks from now on."""
        self._rank = rank
        for transfer in self._flying:
            self._reader.rank(transfer, rank)

    def cancel(self) -> None:
        """Begins no more reads, and tells of none. Idempotent."""
        self._cancelled = True
        self._left.clear()
        for transfer in self._flying:
            self._reader.cancel(transfer)

    def release(self) -> None:
        """The device refers to no slot any more: they are free as soon as the last read has returned."""
        self.cancel()
        self._released = True
        self._settle()

    def _read(self, slots: dict[Piece, int]) -> None:
        def news(batch: Batch) -> None:
            self.started = self.started or transfer.started
            if batch.last:
                self._flying.remove(transfer)
            if not self._cancelled:
                self._told(batch)
            self._settle()

        def deliver(batch: Batch) -> None:
            self._post(lambda: news(batch))

        transfer = Transfer(self._files, slots, list(slots), deliver, self._rank)
        self._flying.append(transfer)
        self._reader.submit(transfer)

    def _settle(self) -> None:
        if self._released and not self._flying and self._slots:
            slots, self._slots = self._slots, ()
            self._free(slots)
