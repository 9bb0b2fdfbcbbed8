"""A version of the disk tier while it is brought by a load, which reads from it what is there already.

The folder and its record are those of `download`: what one leaves, the other goes on with.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from zlib import crc32

from serverless_llm.errors import TransientError
from serverless_llm.loader import download
from serverless_llm.loader.announce import SUFFIX, announced
from serverless_llm.loader.disk_tier import PARTIAL, URL, is_whole, tier
from serverless_llm.loader.download import RECORD, Piece, held, kept, sync
from serverless_llm.loader.leases import lock_of
from serverless_llm.loader.manifest import CHECKPOINT
from serverless_llm.loader.remote import Remote, RemoteFile

PIECE_BYTES = 2 << 20  # to which neighbours are joined in the record; arbitrary: a load reads a piece whole


class Filling:
    """Holds what came of an announced version until `close`; used by one thread, but for `have` and `read`.

    Attributes:
        have: what was there at the beginning, as `download.recorded` gives it.
    """

    def __init__(self, directory: Path, source: Remote, files: Sequence[RemoteFile]) -> None:
        """Raises:
        BlockingIOError: another process brings it, or has.
        OSError: it cannot be written.
        """
        self.url = source.url
        self.directory = directory
        self._source = source
        self._files = files
        self._whole = directory.parent
        self._partial = self._whole.with_name(self._whole.name + PARTIAL)
        self._record = -1
        self._last: Piece | None = None  # that was written, and is not in the record yet
        self._unsynced: set[int] = set()  # files
        self._intact: set[Piece] = set()  # of `have`
        self._partial.mkdir(exist_ok=True)
        lock = lock_of(self._partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            raise BlockingIOError("another process brings it")
        with ExitStack() as failed:
            failed.callback(os.close, lock)
            if is_whole(self._whole):
                raise BlockingIOError("another process has brought it")
            self.have = kept(self._partial, files)
            failed.pop_all()
        self._lock = lock

    def read(self, piece: Piece) -> memoryview | None:
        """One of `have`; None where that is not what was written."""
        data = memoryview(bytearray(piece.stop - piece.start))
        if not download.intact(self._path(piece.file), piece, data):
            return None
        self._intact.add(piece)
        return data

    def _path(self, number: int) -> Path:
        return self._partial / CHECKPOINT / self._files[number].name

    def begin(self) -> None:
        """Makes room, and takes over the text files.

        Raises:
            ServerlessLLMError, OSError: the disk or its tier is full.
        """
        (self._partial / URL).write_text(self.url)
        tier().make_room(self.url, self._files, self._partial)
        self._record = os.open(self._partial / RECORD, os.O_WRONLY | os.O_APPEND)
        for number, file in enumerate(self._files):
            if not file.name.endswith(SUFFIX):
                self.write(number, 0, memoryview((self._whole / CHECKPOINT / file.name).read_bytes()))
        self.commit()

    def write(self, number: int, start: int, data: memoryview) -> None:
        """Bytes at `start` of the file of this number."""
        with self._path(number).open("r+b", buffering=0) as opened:  # anew: there may be more files than descriptors
            done = 0
            while done < len(data):
                done += os.pwrite(opened.fileno(), data[done:], start + done)
        self._note(number, start, data)

    def _note(self, number: int, start: int, data: memoryview) -> None:
        """For the record, which has it once its piece is as long as one may be, or what follows is no neighbour."""
        stop, last = start + len(data), self._last
        if last and (last.file, last.stop) == (number, start) and stop - last.start <= PIECE_BYTES:
            last = last._replace(stop=stop, digest=crc32(data, last.digest))
        else:
            self._add()
            last = Piece(number, start, stop, crc32(data))
        self._last = last
        if stop - last.start >= PIECE_BYTES:
            self._add()

    def _add(self) -> None:
        """The last piece to the record."""
        if self._last:
            download.add(self._record, [self._last])
            self._unsynced.add(self._last.file)
            self._last = None

    def commit(self) -> None:
        """What was written lasts from now on, whatever happens."""
        self._add()
        for number in self._unsynced:
            sync(self._path(number))
        self._unsynced.clear()
        os.fsync(self._record)

    def end(self) -> None:
        """Makes the version whole if nothing is missing, nor damaged of what earlier loads left.

        Raises:
            TransientError: something is damaged; it is missing from now on.
            ServerlessLLMError, OSError: as `DiskTier.finish`.
        """
        sizes = [file.size for file in self._files]
        if download.missing(held(self._partial, self._files), sizes, max(sizes)):
            return
        damaged = {one for one in self.have if one not in self._intact and self.read(one) is None}
        if damaged:
            download.rewrite(self._partial, [one for one in kept(self._partial, self._files) if one not in damaged])
            raise TransientError(f"{self._partial} is damaged: the next start or pull reads that anew")
        tier().finish(self._source, self._files, self._partial, self._whole)

    def close(self) -> None:
        for descriptor in (self._record, self._lock):
            if descriptor >= 0:
                os.close(descriptor)


def lacking(directory: Path) -> int:
    """Bytes of a checkpoint's weights that are on its server alone; 0 where all are in the directory.

    Raises:
        CheckpointError: as `announce.announced`.
        TransientError: as there, or what came cannot be read.
    """
    found = announced(directory)
    if found is None:
        return 0
    directory, _, files = found
    place = directory.parent
    weights = {number for number, file in enumerate(files) if file.name.endswith(SUFFIX)}
    partial = place.with_name(place.name + PARTIAL)
    try:
        there = held(partial, files)
    except OSError as error:
        raise TransientError(f"{partial / RECORD}: {error.strerror}") from error
    came = sum(one.stop - one.start for one in there if one.file in weights)
    return sum(files[number].size for number in weights) - came
