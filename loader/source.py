"""One open file of a checkpoint, read by whichever way is fastest now."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader.plan import PAGE
from serverless_llm.loader.staging import Staging

_CACHESTAT = 451  # system call number, the same on all architectures; Linux 6.5
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True)
class Came:
    """Bytes by where they were: with a server, on a disk, in the page cache."""

    remote: int = 0
    disk: int = 0
    cache: int = 0

    def __add__(self, other: Came) -> Came:
        return Came(self.remote + other.remote, self.disk + other.disk, self.cache + other.cache)

    @property
    def total(self) -> int:
        return self.remote + self.disk + self.cache


class Opened(Protocol):
    """One file of a checkpoint while it is read, by any thread; as `OpenFile` says."""

    def check(self) -> None: ...
    def read(self, buffers: Sequence[memoryview], offset: int, length: int, staging: Staging | None = None) -> Came: ...
    def close(self) -> None: ...


class Source(Protocol):
    """One file of a checkpoint: on a disk, or on a server."""

    @property
    def path(self) -> Path | str: ...  # what the log calls it
    @property
    def size(self) -> int: ...
    @property
    def longest(self) -> int: ...  # bytes of one read of it, now; 0: as long as a disk's
    def open(self) -> Opened: ...


class SourceFile(NamedTuple):
    """A file as it was validated; `path` is its real path."""

    path: Path
    size: int
    mtime_ns: int

    @property
    def longest(self) -> int:
        return 0

    def open(self) -> OpenFile:
        return OpenFile(self)


class OpenFile:
    """Both ways into a file: through the page cache, and past it where the file system allows."""

    def __init__(self, source: SourceFile) -> None:
        """Raises:
        TransientError: it cannot be opened.
        CheckpointError: it is no longer the file that was validated.
        """
        self.source = source
        self._direct = -1
        try:
            self._buffered = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransientError(f"{source.path}: {error.strerror}") from error
        try:
            self.check()
        except CheckpointError:
            self.close()
            raise
        self._direct = _open_direct(source.path)

    def check(self) -> None:
        """Raises:
        TransientError: the system does not tell.
        CheckpointError: size or modification time differ from when the file was validated.
        """
        try:
            stat = os.fstat(self._buffered)
        except OSError as error:
            raise TransientError(f"{self.source.path}: {error.strerror}") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.source.size, self.source.mtime_ns):
            raise CheckpointError(f"{self.source.path} was changed after its header was read: deploy or load it again")

    def read(self, buffers: Sequence[memoryview], offset: int, length: int, staging: Staging | None = None) -> Came:
        """Fills the buffers with `length` bytes from `offset`, a multiple of the page size.

        The buffers are page-aligned and hold at least `length` bytes rounded up to pages. So does `staging`, through
        which the device is read where it is given.

        Raises:
            TransientError: the device fails.
            CheckpointError: the file ends too early.
        """
        try:
            if self._read_cached(buffers, offset, length):
                return Came(cache=length)
            self._read_device(buffers, offset, length, staging)
        except OSError as error:
            where = f"bytes {offset} to {offset + length}"
            raise TransientError(f"{self.source.path}, {where}: {error.strerror}") from error
        return Came(disk=length)

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def _read_cached(self, buffers: Sequence[memoryview], offset: int, length: int) -> bool:
        pages = cached_pages(self._buffered, offset, length)
        if pages is None:
            seems = _seems_cached(self._buffered, offset, length)
            return seems and _read_nowait(self._buffered, buffers, offset) >= length
        if pages * PAGE < length:
            return False
        self._fill(self._buffered, buffers, offset, length)
        return True

    def _read_device(self, buffers: Sequence[memoryview], offset: int, length: int, staging: Staging | None) -> None:
        if self._direct >= 0:
            try:
                if staging is None:
                    self._fill(self._direct, buffers, offset, length)
                else:
                    self._fill(self._direct, [staging.view[: -(-length // PAGE) * PAGE]], offset, length)
                    staging.copy(buffers, length)
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: this file system or device wants another alignment
                    raise
            else:
                return
        self._fill(self._buffered, buffers, offset, length)

    def _fill(self, descriptor: int, buffers: Sequence[memoryview], offset: int, length: int) -> None:
        done = 0
        while done < length:  # past the page cache, what is no whole page ends in EINVAL
            count = os.preadv(descriptor, _after(buffers, done), offset + done)
            if not count:
                raise CheckpointError(f"{self.source.path} ends at byte {offset + done}: it was cut")
            done += count


def _open_direct(path: Path) -> int:
    """-1 where the file system has no O_DIRECT."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1


def _after(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """The buffers without their first `done` bytes."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest


def cached_pages(descriptor: int, offset: int, length: int) -> int | None:
    """How many pages of the range are in the page cache; None where the system does not tell (kernel, seccomp)."""
    span = (ctypes.c_uint64 * 2)(offset, length)
    stat = (ctypes.c_uint64 * 5)()  # cache, dirty, writeback, evicted, recently evicted
    found = 0
    for _ in range(2):  # one answer in 25,000 lacked a page (Linux 6.18)
        if _LIBC.syscall(_CACHESTAT, descriptor, span, stat, 0):
            return None
        found = max(found, stat[0])
        if not found or found * PAGE >= length:
            break
    return found


def _seems_cached(descriptor: int, offset: int, length: int) -> bool:
    """By mincore(2). Only False is certain: of other users' files that this one may not write, it tells nothing."""
    address = _LIBC.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    absent = _LIBC.mincore(address, length, pages) == 0 and 0 in bytes(pages)
    _LIBC.munmap(address, length)
    return not absent


def _read_nowait(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Reads what the page cache has from `offset` on; bytes read. Does not wait for the device, but where nothing is
    cached starts a read-ahead, which may be quick enough to look like a cache."""
    try:
        return os.preadv(descriptor, buffers, offset, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: the file system cannot say
        return 0
