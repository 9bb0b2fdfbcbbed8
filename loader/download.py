"""A remote checkpoint's files into a folder: ranges side by side, and a record of what is there.

    FOLDER/checkpoint/NAME      as long as the file at once, with holes where nothing came yet
    FOLDER/record               lines `number start stop`: bytes of file `number` that are there

A range stands in the record only when its bytes were synced to the disk, so that what an interruption leaves is gone on
with, whatever it was. Bytes are written past the page cache where the file system allows: copied once, from what came
into memory of whole pages, which is the caller's own where he wants them at once.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from serverless_llm.errors import TransientError
from serverless_llm.loader.remote import Remote, RemoteFile

CHECKPOINT = "checkpoint"
RECORD = "record"
CONNECTIONS = 16  # one stream does not fill a fast link, nor one core that copies
RANGE_BYTES = 16 << 20  # asked for at once, or less where that is more than a 64th of all
CHUNKS = 8  # of a range: what is written, and recorded, at a time
PAGE = 4096  # what writes past the page cache begin and end with, in the file and in memory
WAITING = 32  # chunks that were written and not yet synced
JOIN_SECONDS = 0.5  # for threads that are busy to hear of an end; one that waits for its server ends with the process

Told = Callable[[str, int, int], None]  # file, bytes that are there, bytes of all


class Range(NamedTuple):
    """Bytes from `start` to `stop` of the file of this number."""

    file: int
    start: int
    stop: int


def recorded(text: str, sizes: Sequence[int]) -> list[Range]:
    """The ranges of a record, in order and joined. What is no line of one counts for nothing, as the last may be."""
    found = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and len(words) == 3 and all(word.isascii() and word.isdigit() for word in words):
            one = Range(*map(int, words))
            if one.file < len(sizes) and one.start < one.stop <= sizes[one.file]:
                found.append(one)
    joined: list[Range] = []
    for one in sorted(found):
        if joined and joined[-1].file == one.file and joined[-1].stop >= one.start:
            joined[-1] = joined[-1]._replace(stop=max(joined[-1].stop, one.stop))
        else:
            joined.append(one)
    return joined


def missing(have: Sequence[Range], sizes: Sequence[int], most: int) -> list[Range]:
    """What is not there, in pieces of `most` bytes at most. `have` is as `recorded` gives it."""
    gaps = []
    for number, size in enumerate(sizes):
        at = 0
        for one in (*(one for one in have if one.file == number), Range(number, size, size)):
            gaps += [Range(number, start, min(start + most, one.start)) for start in range(at, one.start, most)]
            at = one.stop
    return gaps


def held(folder: Path, files: Sequence[RemoteFile]) -> list[Range]:
    """What is there of the files."""
    try:
        text = (folder / RECORD).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return []
    return recorded(text, [file.size for file in files])


def prepare(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Every file in its full length, which counts against the tier's bound from then on."""
    for file in files:
        path = folder / CHECKPOINT / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as opened:
            if opened.tell() != file.size:
                opened.truncate(file.size)


def sync(path: Path) -> None:
    """What is written to a file, or which names a directory has, outlives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def download(
    source: Remote, files: Sequence[RemoteFile], folder: Path, told: Told, memory: Mapping[str, memoryview]
) -> None:
    """Brings what is missing of prepared files.

    Args:
        memory: by a file's name, where all of its bytes are wanted, too: of whole pages, and all of the file's.

    Raises:
        CheckpointError: as `Remote.read`.
        TransientError: the server fails, or the disk takes no more; the next call goes on with what came.
    """
    try:
        _Download(source, files, folder, told, memory).run()
    except OSError as error:
        why = f"{source.url} cannot be kept in {folder.parent}: {error.strerror}"
        raise TransientError(f"{why}; the next try goes on with what came") from error


class _Download:
    def __init__(
        self,
        source: Remote,
        files: Sequence[RemoteFile],
        folder: Path,
        told: Told,
        memory: Mapping[str, memoryview],
    ) -> None:
        sizes = [file.size for file in files]
        self._chunk_bytes = max(1 << 16, min(RANGE_BYTES, sum(sizes) // 64)) // CHUNKS // PAGE * PAGE
        self._range_bytes = CHUNKS * self._chunk_bytes
        self._source = source
        self._memory = memory
        self._files = files
        self._folder = folder
        self._told = told
        self._have = held(folder, files)
        self._work: queue.SimpleQueue[Range] = queue.SimpleQueue()
        for one in missing(self._have, sizes, self._range_bytes):
            self._work.put(one)
        self._landed: queue.Queue[Range | Exception] = queue.Queue(WAITING)
        self._stop = threading.Event()

    def run(self) -> None:
        done: Counter[int] = Counter()
        for one in self._have:
            done[one.file] += one.stop - one.start
        left = sum(file.size for file in self._files) - done.total()
        count = min(CONNECTIONS, self._work.qsize())
        threads = [threading.Thread(target=self._read_ranges, daemon=True) for _ in range(count)]
        self._recall()
        with self._record() as record:
            for thread in threads:
                thread.start()
            try:
                while left:
                    batch = self._batch()
                    ranges = [one for one in batch if isinstance(one, Range)]
                    self._commit(record.fileno(), ranges)
                    for one in ranges:
                        done[one.file] += one.stop - one.start
                        left -= one.stop - one.start
                    self._tell(done, {one.file for one in ranges})
                    for error in batch:
                        if isinstance(error, Exception):
                            raise error
            finally:
                self._end(threads)

    def _record(self) -> IO[str]:
        """The record, written anew of what it holds; open for more."""
        fresh = self._folder / f"{RECORD}.new"
        with fresh.open("w") as opened:
            self._commit(opened.fileno(), self._have)
        fresh.rename(self._folder / RECORD)
        return (self._folder / RECORD).open("a")

    def _recall(self) -> None:
        """What came before, into the memory."""
        for one in self._have:
            name = self._files[one.file].name
            if name in self._memory:
                with (self._folder / CHECKPOINT / name).open("rb", buffering=0) as opened:
                    opened.seek(one.start)
                    _Flow(iter(lambda: opened.read(1 << 20), b"")).fill(self._memory[name][one.start : one.stop])

    def _batch(self) -> list[Range | Exception]:
        """What has landed since the last call; waits for something."""
        batch = [self._landed.get()]
        while not self._landed.empty():
            batch.append(self._landed.get())
        return batch

    def _commit(self, record: int, ranges: Sequence[Range]) -> None:
        for number in {one.file for one in ranges}:
            sync(self._folder / CHECKPOINT / self._files[number].name)
        os.write(record, "".join(f"{one.file} {one.start} {one.stop}\n" for one in ranges).encode())
        os.fsync(record)

    def _tell(self, done: Counter[int], numbers: set[int]) -> None:
        for number in sorted(numbers):
            file = self._files[number]
            self._told(file.name, done[number], file.size)

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        """Ends the threads, but waits for none that hears nothing from its server."""
        self._stop.set()
        for thread in threads:
            while not self._landed.empty():  # nobody waits to be heard
                self._landed.get()
            thread.join(JOIN_SECONDS / len(threads))

    def _read_ranges(self) -> None:
        own = memoryview(mmap.mmap(-1, self._chunk_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        while not self._stop.is_set():
            try:
                self._read(self._work.get_nowait(), own)
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001  the thread's edge: whoever waits raises it
                self._landed.put(error)
                return

    def _read(self, wanted: Range, own: memoryview) -> None:
        file = self._files[wanted.file]
        flow = _Flow(self._source.read(file, wanted.start, wanted.stop, least=1))
        memory = self._memory.get(file.name)
        with _Written(self._folder / CHECKPOINT / file.name) as written:
            for at in range(wanted.start, wanted.stop, self._chunk_bytes):
                nbytes = min(self._chunk_bytes, wanted.stop - at)
                place = own[:nbytes] if memory is None else memory[at : at + nbytes]
                flow.fill(place)
                if self._stop.is_set():
                    return
                written.write(place, at)
                self._landed.put(Range(wanted.file, at, at + nbytes))


class _Flow:
    """Bytes that come in portions of any size; those that are asked for are there, or the next portion raises."""

    def __init__(self, portions: Iterator[bytes]) -> None:
        self._portions = portions
        self._rest = memoryview(b"")

    def fill(self, place: memoryview) -> None:
        while place:
            if not self._rest:
                self._rest = memoryview(next(self._portions))
            count = min(len(place), len(self._rest))
            place[:count] = self._rest[:count]
            place, self._rest = place[count:], self._rest[count:]


class _Written:
    """A file that is written past the page cache where its file system allows, through it elsewhere."""

    def __init__(self, path: Path) -> None:
        self._buffered = os.open(path, os.O_WRONLY)
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError:  # this file system has no such thing
            self._direct = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def write(self, data: memoryview, offset: int) -> None:
        """`data` begins with a page. Whole pages go past the cache; what is left of them, by whatever reason, not."""
        done = self._past_the_cache(data[: len(data) // PAGE * PAGE], offset)
        while done < len(data):
            done += os.pwrite(self._buffered, data[done:], offset + done)

    def _past_the_cache(self, pages: memoryview, offset: int) -> int:
        if self._direct < 0 or offset % PAGE or not pages:
            return 0
        try:
            return os.pwrite(self._direct, pages, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system or device wants another alignment
                raise
            return 0
