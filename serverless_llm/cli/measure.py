"""Bandwidths of this machine as a cold start meets them, in bytes per second; each takes about a second."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CALL = 32 << 20  # bytes of one read
THREADS = 4
SECONDS = 1.0  # of reading; enough to be above what any cache in a drive holds up
LARGE = 64 << 20  # bytes of a file that is worth reading
SCRATCH = 256 << 20  # bytes of the file that is written where there is none
COPY = 256 << 20  # bytes of one copy, beyond any cache
REPEATS = 3


class Disk(NamedTuple):
    """`direct`: read past the page cache; else the figure is of whatever the system held."""

    rate: float
    direct: bool


def disk(files: Sequence[Path], seconds: float = SECONDS) -> Disk:
    """Reads the files for so long, with O_DIRECT where the file system knows it.

    Raises OSError: one of them cannot be read.
    """
    opened, direct = [], True
    try:
        for path in files:
            descriptor, past_cache = _open(path)
            opened.append((descriptor, path.stat().st_size))
            direct &= past_cache
        calls = ((descriptor, offset) for descriptor, size in opened for offset in range(0, size, CALL))
        return Disk(_read(itertools.cycle(calls) if direct else calls, seconds), direct)
    finally:
        for descriptor, _ in opened:
            os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor, False


def _read(calls: Iterator[tuple[int, int]], seconds: float) -> float:
    """Reads of (descriptor, offset), `CALL` bytes each, by a few threads; bytes per second."""
    lock, counts, errors = threading.Lock(), [0] * THREADS, list[OSError]()
    deadline = time.monotonic() + seconds

    def work(number: int) -> None:
        with memory(CALL) as buffer:
            while counts[number] == 0 or time.monotonic() < deadline:
                with lock:
                    descriptor, offset = next(calls, (-1, 0))
                if descriptor < 0:
                    return
                try:
                    counts[number] += os.preadv(descriptor, [buffer], offset)
                except OSError as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.monotonic() - began)


def memory(nbytes: int) -> mmap.mmap:
    """In huge pages, if there are any, as the pool has them: into small ones reads are slower. A private mapping:
    `mmap.mmap` alone gives a shared one, which ignores such advice."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


@contextlib.contextmanager
def scratch(folder: Path, nbytes: int = SCRATCH) -> Iterator[Path]:
    """A file of that many bytes on the disk, for as long as it is needed. Raises OSError."""
    path = folder / f".doctor-{os.getpid()}"
    block = os.urandom(1 << 20)  # a disk that compresses must not seem fast
    try:
        with path.open("wb") as file:
            for _ in itertools.repeat(None, nbytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def memcpy(nbytes: int = COPY) -> float:
    """The best of a few copies by one thread."""
    with memory(nbytes) as source, memory(nbytes) as target:
        ends = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (target, source)]
        ctypes.memset(ends[1], 1, nbytes)  # pages are there before they are copied
        return max(_timed_copy(ends[0], ends[1], nbytes) for _ in range(REPEATS + 1))


def _timed_copy(target: int, source: int, nbytes: int) -> float:
    began = time.perf_counter()
    ctypes.memmove(target, source, nbytes)
    return nbytes / (time.perf_counter() - began)


def device(number: int) -> float:  # pragma: no cover - cuda
    """From pinned memory to a GPU, the best of a few copies. Raises RuntimeError: CUDA fails."""
    import torch

    source = torch.empty(COPY, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY, dtype=torch.uint8, device=f"cuda:{number}")
    rates = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize(number)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(number)
        rates.append(COPY / (time.perf_counter() - began))
    return max(rates)
