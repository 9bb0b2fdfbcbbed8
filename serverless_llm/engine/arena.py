"""The bytes of one device: one range with a fixed base, whatever lies in it."""

from __future__ import annotations

import mmap

import torch

from serverless_llm.engine.blocks import SLAB_STEP, Range
from serverless_llm.loader.memory import want_huge


class Arena:
    """`budget` bytes. On a CPU they are anonymous memory that takes room only where it was written.

    Attributes:
        bytes: uint8 [budget], rounded down to a multiple of 64 KiB; zero at first.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        size = budget // SLAB_STEP * SLAB_STEP
        self._map: mmap.mmap | None = None
        if device.type == "cpu":
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)

    def rows(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The whole arena as [as many as fit, *shape] of `dtype`; row r begins at byte r * (bytes of a row)."""
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        count = self.bytes.numel() // size
        return self.bytes[: count * size].view(dtype).view(count, *shape)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        return self.bytes[offset : offset + size].view(dtype).view(shape)

    def fill(self, place: Range) -> None:
        """All of it will be written: huge pages, where the system has them, save it a page fault for every 4 KiB."""
        if self._map is not None:
            want_huge(self.bytes.data_ptr() + place.offset, place.size)

    def clear(self, place: Range) -> None:
        """Zeroes these bytes: what a stale block holds must not reach a masked product as NaN."""
        self.bytes[place.offset : place.end].zero_()

    def release(self, place: Range) -> None:
        """Gives the whole pages of a range back to the system; they read as zero afterwards."""
        if self._map is None:
            return
        first = -(-place.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = place.end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
