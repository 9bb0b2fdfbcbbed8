"""One shared memory area per node, cut into slots; the agent writes, workers map it read-only.

A memfd, or a file like one, passed by descriptor: nothing under /dev/shm, which is 64 MiB in containers. Its memory is
taken when a slot is touched or first written, and stays until the slot is punched: reads into memory that is there are
the fast ones.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from serverless_llm.errors import CapacityError
from serverless_llm.loader import hugefile
from serverless_llm.quantities import size

MIN_SLOT = 1 << 20
MAX_SLOT = 16 << 20
HUGE_PAGE = 2 << 20
LARGE = 256 << 20  # bytes of a pool that has slots of whole huge pages
TOUCH = 1 << 20  # bytes taken in one call: others who map memory wait for it
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)
_POPULATE_WRITE = 23  # madvise(2); Linux 5.14
_SHMEM_HUGE = ("[always]", "[within_size]", "[advise]", "[force]")
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def slot_size(capacity: int) -> int:
    """Bytes of a slot: about a thousandth of the pool, a power of two of 1 ... 16 MiB."""
    least = HUGE_PAGE if capacity >= LARGE else MIN_SLOT
    return max(least, min(MAX_SLOT, 1 << max(0, (capacity // 1024).bit_length() - 1)))


class Pool:
    """`capacity` bytes, rounded down to whole slots. `on_punch`: called with the offset of every slot that is punched.

    Attributes:
        fd: the file, to be passed to workers.
        pages: `hugetlb`, `huge` or `small`: what backs it. Small pages cost a fifth of the bandwidth.
    """

    def __init__(self, capacity: int, on_punch: Callable[[int], None] = lambda offset: None) -> None:
        self.slot_bytes = slot_size(capacity)
        self.slots = capacity // self.slot_bytes
        self._on_punch = on_punch
        self.capacity = self.slots * self.slot_bytes
        if not self.slots:
            raise CapacityError(f"a pool of {size(capacity)} holds no slot of {size(self.slot_bytes)}")
        self.pages, self.fd = _memory(self.capacity, self.slot_bytes)
        os.ftruncate(self.fd, self.capacity)
        self._map = mmap.mmap(self.fd, self.capacity, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        if self.pages == "huge":
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def offset(self, slot: int) -> int:
        """Where the slot begins in the pool."""
        return slot * self.slot_bytes

    def range(self, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset` of the pool, writable."""
        return self._view[offset : offset + length]

    def touch(self, slot: int) -> None:
        """Takes the slot's memory now, off the GIL; what it holds stays. Older kernels refuse: its first write pays."""
        start = self._address + self.offset(slot)
        for address in range(start, start + self.slot_bytes, TOUCH):
            _LIBC.madvise(address, TOUCH, _POPULATE_WRITE)

    def punch(self, slots: Iterable[int]) -> None:
        """Gives these slots' memory back to the system; their next write takes new memory."""
        for slot in slots:
            if _LIBC.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, self.offset(slot), self.slot_bytes):
                raise OSError(ctypes.get_errno(), "fallocate")
            self._on_punch(self.offset(slot))

    @property
    def memory(self) -> int:
        """Bytes of memory that the pool holds now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """No view of it may be in use."""
        self._view.release()
        self._map.close()
        os.close(self.fd)


def _memory(capacity: int, slot_bytes: int) -> tuple[str, int]:
    """The best kind of pages that can be had, and an empty file of them. Never changes a system setting."""
    whole = slot_bytes >= HUGE_PAGE
    if whole and _free_huge_pages() * HUGE_PAGE >= capacity:
        return "hugetlb", os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    if shared_huge_pages():
        return "huge", os.memfd_create("weights", os.MFD_CLOEXEC)
    private = hugefile.open_file(capacity) if whole else None
    if private is not None:
        return "huge", private
    return "small", os.memfd_create("weights", os.MFD_CLOEXEC)


def shared_huge_pages() -> bool:
    """Whether memfds get huge pages when they ask for them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return setting.exists() and any(word in setting.read_text() for word in _SHMEM_HUGE)


def _free_huge_pages() -> int:
    pages = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE // 1024}kB/free_hugepages")
    return int(pages.read_text()) if pages.exists() else 0
