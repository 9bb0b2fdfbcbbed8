"""Mappings of the pool that Python's own `mmap` cannot make: at a fixed address, read-only."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Collection
from pathlib import Path

_NORESERVE, _FIXED = 0x4000, 0x10
_POPULATE_READ = 22  # madvise; Linux 5.14
_PRESENT = 0x80  # of the last byte of a page's entry in pagemap
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def want_huge(address: int, length: int) -> None:
    """Asks for huge pages for what of these bytes was not touched yet, to whole pages. The kernel may refuse."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    stop = -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE
    _LIBC.madvise(first, stop - first, mmap.MADV_HUGEPAGE)


class Range:
    """`length` bytes of address space, unreadable until `place` puts parts of a file there.

    `buffer` is the whole range; it is unmapped when the Range and everything made from `buffer` are gone.
    """

    def __init__(self, length: int, align: int = mmap.PAGESIZE) -> None:
        """`align`: a power of two; huge pages want their own size."""
        room = length + align - mmap.PAGESIZE
        base = _map(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        self.address = -(-base // align) * align
        self.length = length
        self.buffer = (ctypes.c_char * length).from_address(self.address)
        self._unmap = weakref.finalize(self.buffer, _LIBC.munmap, base, room)
        self._unmap.atexit = False  # the process's end unmaps, after whatever still reads

    def place(self, offset: int, length: int, fd: int, file_offset: int) -> None:
        """Shows `length` bytes of `fd` from `file_offset` at `offset` of the range, read-only."""
        _map(self.address + offset, length, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, fd, file_offset)

    def populate(self, offset: int, length: int) -> None:
        """Takes the page faults of whole pages now, off the GIL. Older kernels refuse; the first reader pays there."""
        _LIBC.madvise(self.address + offset, length, _POPULATE_READ)

    def missing(self, offsets: Collection[int]) -> list[int]:
        """Those of these offsets that no page is mapped at: their first reader takes a page fault. All of them where
        the system does not tell (proc_pid_pagemap(5))."""
        try:
            with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
                first, entries = self.address // mmap.PAGESIZE, pagemap.fileno()
                pages = ((one, first + one // mmap.PAGESIZE) for one in offsets)
                return [one for one, page in pages if not os.pread(entries, 8, 8 * page)[7] & _PRESENT]
        except OSError:
            return list(offsets)

    def release(self, offset: int, length: int) -> None:
        """Undoes `populate`, off the GIL: the next reader takes the faults. What is left to unmap is cheap then."""
        _LIBC.madvise(self.address + offset, length, mmap.MADV_DONTNEED)

    def unused(self) -> bool:
        """Nothing made from `buffer` refers to it any more."""
        return sys.getrefcount(self.buffer) == 2  # the attribute and the argument

    def close(self) -> bool:
        """Drops the range's own hold. True: it is unmapped; False: something made from `buffer` still refers to it,
        and it is unmapped with the last of them. Idempotent."""
        if hasattr(self, "buffer"):
            del self.buffer
        return not self._unmap.alive


def _map(address: int | None, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    base: int | None = _LIBC.mmap(address, length, protection, flags, fd, offset)
    if base is None or base == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return base
