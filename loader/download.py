"""A remote checkpoint's files into a folder: ranges side by side, and a record of what is there.

    FOLDER/checkpoint/NAME      as long as the file at once, with holes where nothing came yet
    FOLDER/record               lines `number start stop`: bytes of file `number` that are there

A range stands in the record only when its bytes were synced to the disk, so that what an interruption leaves is gone on
with, whatever it was.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from serverless_llm.errors import TransientError
from serverless_llm.loader.remote import Remote, RemoteFile

CHECKPOINT = "checkpoint"
RECORD = "record"
CONNECTIONS = 16  # one stream does not fill a fast link, nor one core that copies
RANGE_BYTES = 16 << 20  # asked for at once, or less where that is more than a 64th of all
CHUNKS = 8  # of a range: what is written, and recorded, at a time
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


def download(source: Remote, files: Sequence[RemoteFile], folder: Path, told: Told) -> None:
    """Brings what is missing of prepared files.

    Raises:
        CheckpointError: as `Remote.read`.
        TransientError: the server fails, or the disk takes no more; the next call goes on with what came.
    """
    try:
        _Download(source, files, folder, told).run()
    except OSError as error:
        why = f"{source.url} cannot be kept in {folder.parent}: {error.strerror}"
        raise TransientError(f"{why}; the next try goes on with what came") from error


class _Download:
    def __init__(self, source: Remote, files: Sequence[RemoteFile], folder: Path, told: Told) -> None:
        sizes = [file.size for file in files]
        self._range_bytes = max(1 << 16, min(RANGE_BYTES, sum(sizes) // 64))
        self._source = source
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
        while not self._stop.is_set():
            try:
                self._read(self._work.get_nowait())
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001  the thread's edge: whoever waits raises it
                self._landed.put(error)
                return

    def _read(self, wanted: Range) -> None:
        file = self._files[wanted.file]
        descriptor = os.open(self._folder / CHECKPOINT / file.name, os.O_WRONLY)
        try:
            at = wanted.start
            for chunk in self._source.read(file, wanted.start, wanted.stop, self._range_bytes // CHUNKS):
                if self._stop.is_set():
                    return
                _write(descriptor, chunk, at)
                self._landed.put(Range(wanted.file, at, at + len(chunk)))
                at += len(chunk)
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
