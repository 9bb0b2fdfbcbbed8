"""A remote checkpoint's files into a folder: ranges side by side, and a record of what is there.

    FOLDER/checkpoint/NAME      as long as the file at once, with holes where nothing came yet
    FOLDER/record               lines `number start stop digest check`: bytes of file `number` that are there; CRC-32 of
                                these bytes, and of the line up to there

A piece stands in the record as soon as it is written, so that a process that is killed loses only what was on its way;
both are synced soon after, and files once more before a version is whole. What an earlier call left is read and
compared while the rest comes; what is not what was written, as after a crash of the machine, is brought again. Bytes
are written past the page cache where the file system allows: copied once, from what came into memory of whole pages,
which is the caller's own where he wants them at once.
"""

from __future__ import annotations

import mmap
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from serverless_llm.errors import TransientError
from serverless_llm.loader.manifest import CHECKPOINT
from serverless_llm.loader.remote import Remote, RemoteFile
from serverless_llm.loader.uncached import PAGE, Written

RECORD = "record"
CONNECTIONS = 16  # one stream does not fill a fast link, nor one core that copies
RANGE_BYTES = 8 << 20  # asked for at once, or less where that is more than a 64th of all: what a kill can lose, of each
COMPARING = 4  # one thread in so many compares what is there before it asks for more
CHUNKS = 4  # of a range: what is written, and recorded, at a time
WAITING = 32  # chunks that were written and not yet synced
JOIN_SECONDS = 0.5  # for threads that are busy to hear of an end; one that waits for its server ends with the process

LINE = re.compile(r"((\d{1,5}) (\d{1,19}) (\d{1,19}) ([0-9a-f]{8})) ([0-9a-f]{8})\n", re.ASCII)

Told = Callable[[str, int, int], None]  # file, bytes that are there, bytes of all


class Range(NamedTuple):
    """Bytes from `start` to `stop` of the file of this number."""

    file: int
    start: int
    stop: int


class Piece(NamedTuple):
    """Such bytes as they were written. `digest`: their CRC-32."""

    file: int
    start: int
    stop: int
    digest: int


class Compared(NamedTuple):
    """A piece of an earlier call, compared."""

    piece: Piece
    intact: bool


def recorded(text: str, sizes: Sequence[int]) -> list[Piece]:
    """The pieces of a record, by files and starts, none within another. What is no line of one counts for nothing."""
    found = []
    for row in text.splitlines(keepends=True):
        words = LINE.fullmatch(row)
        if words and crc32(words[1].encode()) == int(words[6], 16):
            one = Piece(int(words[2]), int(words[3]), int(words[4]), int(words[5], 16))
            if one.file < len(sizes) and one.start < one.stop <= sizes[one.file]:
                found.append(one)
    pieces: list[Piece] = []
    for one in sorted(found):
        last = pieces[-1] if pieces and pieces[-1].file == one.file else None
        if last and last.start == one.start:
            pieces[-1] = one  # it is no shorter
        elif not last or last.stop < one.stop:
            pieces.append(one)
    return pieces


def joined(pieces: Sequence[Piece]) -> list[Range]:
    """What pieces, as `recorded` gives them, have in all, in order."""
    ranges: list[Range] = []
    for one in pieces:
        if ranges and ranges[-1].file == one.file and ranges[-1].stop >= one.start:
            ranges[-1] = ranges[-1]._replace(stop=one.stop)
        else:
            ranges.append(Range(*one[:3]))
    return ranges


def apart(pieces: Sequence[Piece]) -> list[Piece]:
    """Of pieces, as `recorded` gives them, those that have no byte of the one before."""
    found: list[Piece] = []
    for one in pieces:
        if not found or found[-1].file != one.file or found[-1].stop <= one.start:
            found.append(one)
    return found


def add(record: int, pieces: Sequence[Piece]) -> None:
    """Lines to a record."""
    data = "".join(map(line, pieces)).encode()
    while data:
        data = data[os.write(record, data) :]


def line(piece: Piece) -> str:
    """Of a record."""
    text = f"{piece.file} {piece.start} {piece.stop} {piece.digest:08x}"
    return f"{text} {crc32(text.encode()):08x}\n"


def rewrite(folder: Path, pieces: Sequence[Piece]) -> None:
    """The record, of these alone."""
    fresh = folder / f"{RECORD}.new"
    with fresh.open("w") as opened:
        add(opened.fileno(), pieces)
        os.fsync(opened.fileno())
    fresh.rename(folder / RECORD)


def intact(path: Path, piece: Piece, place: memoryview) -> bool:
    """Reads a piece into a place of its length. False where that is not what was written: it is to be brought again."""
    try:
        with path.open("rb", buffering=0) as opened:
            opened.seek(piece.start)
            done = 0
            while done < len(place) and (count := opened.readinto(place[done:])):
                done += count
            os.posix_fadvise(opened.fileno(), piece.start, len(place), os.POSIX_FADV_DONTNEED)  # others' stays cached
    except OSError:  # a bad sector, too, is written anew
        return False
    return done == len(place) and crc32(place) == piece.digest


def missing(have: Iterable[Range], sizes: Sequence[int], most: int) -> list[Range]:
    """What is not there, in ranges of `most` bytes at most. `have` is as `joined` gives it."""
    gaps = []
    there = {number: [*ranges] for number, ranges in groupby(have, lambda one: one.file)}
    for number, size in enumerate(sizes):
        at = 0
        for one in (*there.get(number, ()), Range(number, size, size)):
            gaps += [Range(number, start, min(start + most, one.start)) for start in range(at, one.start, most)]
            at = one.stop
    return gaps


def kept(folder: Path, files: Sequence[RemoteFile]) -> list[Piece]:
    """What the record has of the files, as far as these are long enough for it."""
    try:
        text = (folder / RECORD).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return []
    return recorded(text, [min(file.size, _length(folder / CHECKPOINT / file.name)) for file in files])


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def held(folder: Path, files: Sequence[RemoteFile]) -> list[Range]:
    """What is there of the files, by their record."""
    return joined(kept(folder, files))


def prepare(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Every file in its full length, which counts against the tier's bound from then on; a record of what it had."""
    rewrite(folder, kept(folder, files))
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
        TransientError: the server fails, the disk takes no more, or the machine has no memory or threads for it; the
            next call goes on with what came.
    """
    try:
        _Download(source, files, folder, told, memory).run()
    except OSError as error:
        why = f"{source.url} cannot be kept in {folder.parent}: {error.strerror}"
        raise TransientError(f"{why}; the next try goes on with what came") from error
    except MemoryError as error:
        raise TransientError(f"no memory for what comes of {source.url}") from error


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
        pieces = apart(kept(folder, files))
        self._kept: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._done: Counter[int] = Counter()  # bytes that are there, by files
        for piece in pieces:
            self._kept.put(piece)
            self._done[piece.file] += piece.stop - piece.start
        self._work: queue.SimpleQueue[Range] = queue.SimpleQueue()
        for one in missing(joined(pieces), sizes, self._range_bytes):
            self._work.put(one)
        self._landed: queue.Queue[Piece | Compared | BaseException] = queue.Queue(WAITING)
        self._stop = threading.Event()
        self._writes = threading.Semaphore(CONNECTIONS)  # one is held while a thread writes

    def run(self) -> None:
        left = sum(file.size for file in self._files)
        threads: list[threading.Thread] = []
        self._tell({*range(len(self._files))})
        try:
            self._begin(threads)
            while left:
                batch = self._batch()
                written = [one for one in batch if isinstance(one, Piece)]
                compared = [one for one in batch if isinstance(one, Compared)]
                self._sync({one.file for one in written})
                self._count(written, [one.piece for one in compared if not one.intact])
                there = written + [one.piece for one in compared if one.intact]
                left -= sum(one.stop - one.start for one in there)
                for error in batch:
                    if isinstance(error, BaseException):
                        raise error
        finally:
            self._end(threads)

    def _begin(self, threads: list[threading.Thread]) -> None:
        """Starts as many as there is work for, each of which is in the list from then on."""
        for number in range(min(CONNECTIONS, self._work.qsize() + self._kept.qsize())):
            thread = threading.Thread(target=self._bring, args=(number % COMPARING == 0,), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more
                why = f"{self._source.url} needs {CONNECTIONS} threads to come, and the machine has no more"
                raise TransientError(f"{why}: {error}") from error
            threads.append(thread)

    def _batch(self) -> list[Piece | Compared | BaseException]:
        """What has landed since the last call; waits for something."""
        batch = [self._landed.get()]
        while not self._landed.empty():
            batch.append(self._landed.get())
        return batch

    def _sync(self, numbers: set[int]) -> None:
        """The files of these numbers, and what the record has of them."""
        for number in numbers:
            sync(self._folder / CHECKPOINT / self._files[number].name)
        if numbers:
            sync(self._folder / RECORD)

    def _count(self, written: Sequence[Piece], damaged: Sequence[Piece]) -> None:
        """Tells of files with what came and without what must come again."""
        for sign, pieces in ((1, written), (-1, damaged)):
            for one in pieces:
                self._done[one.file] += sign * (one.stop - one.start)
        self._tell({one.file for one in (*written, *damaged)})

    def _tell(self, numbers: set[int]) -> None:
        for number in sorted(numbers):
            file = self._files[number]
            self._told(file.name, self._done[number], file.size)

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        """Ends the threads. Nothing is written once this returns, but it waits for none that hears nothing from its
        server."""
        self._stop.set()
        for _ in range(CONNECTIONS):
            self._writes.acquire()
        self._writes.release(CONNECTIONS)
        for thread in threads:
            while not self._landed.empty():  # nobody waits to be heard
                self._landed.get()
            thread.join(JOIN_SECONDS / len(threads))

    def _bring(self, compares: bool) -> None:
        try:
            own = self._pages()
            if compares:
                self._compare()
            while not self._stop.is_set():
                self._read(self._work.get_nowait(), own)
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001  the thread's edge, also of obstore's panics: whoever waits raises it
            self._landed.put(error)

    def _pages(self) -> memoryview:
        """Memory of whole ones for a chunk."""
        try:
            return memoryview(mmap.mmap(-1, self._chunk_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except OSError as error:
            raise TransientError(f"no memory for what comes of {self._source.url}: {error.strerror}") from error

    def _compare(self) -> None:
        """What an earlier call left, which comes into the memory, too; what is damaged is read as what is missing."""
        while not self._stop.is_set():
            try:
                piece = self._kept.get_nowait()
            except queue.Empty:
                return
            name, nbytes = self._files[piece.file].name, piece.stop - piece.start
            memory = self._memory.get(name)
            place = memoryview(bytearray(nbytes)) if memory is None else memory[piece.start : piece.stop]
            compared = Compared(piece, intact(self._folder / CHECKPOINT / name, piece, place))
            self._landed.put(compared)
            if compared.intact:
                continue
            for at in range(piece.start, piece.stop, self._range_bytes):
                self._work.put(Range(piece.file, at, min(at + self._range_bytes, piece.stop)))

    def _read(self, wanted: Range, own: memoryview) -> None:
        file = self._files[wanted.file]
        flow = _Flow(self._source.read(file, wanted.start, wanted.stop, least=1))
        memory = self._memory.get(file.name)
        with Written(self._folder / CHECKPOINT / file.name) as written, (self._folder / RECORD).open("a") as record:
            for at in range(wanted.start, wanted.stop, self._chunk_bytes):
                nbytes = min(self._chunk_bytes, wanted.stop - at)
                place = own[:nbytes] if memory is None else memory[at : at + nbytes]
                flow.fill(place)
                piece = Piece(wanted.file, at, at + nbytes, crc32(place))
                with self._writes:
                    if self._stop.is_set():
                        return
                    written.write(place, at)
                    record.write(line(piece))
                    record.flush()
                self._landed.put(piece)


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
