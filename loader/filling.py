"""A version of the disk tier while it is brought by a load, which reads from it what is there already.

The folder and its record are those of `download`: what one leaves, the other goes on with.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from serverless_llm.errors import TransientError
from serverless_llm.loader.announce import SUFFIX, announced
from serverless_llm.loader.disk_tier import PARTIAL, URL, VARIABLE, DiskTier, is_whole, lock_of
from serverless_llm.loader.download import CHECKPOINT, RECORD, Range, held, missing, sync
from serverless_llm.loader.remote import Remote, RemoteFile


class Filling:
    """Holds what came of an announced version until `close`; used by one thread, but for `have` and `path`.

    Attributes:
        have: what was there at the beginning, as `download.recorded` gives it.
    """

    def __init__(self, directory: Path, source: Remote, files: Sequence[RemoteFile]) -> None:
        """Raises:
        BlockingIOError: another process brings it.
        OSError: it cannot be written.
        """
        self.url = source.url
        self.directory = directory
        self._source = source
        self._files = files
        self._whole = directory.parent
        self._partial = self._whole.with_name(self._whole.name + PARTIAL)
        self._record = -1
        self._descriptors: dict[int, int] = {}
        self._partial.mkdir(exist_ok=True)
        lock = lock_of(self._partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None or is_whole(self._whole):
            if lock is not None:
                os.close(lock)
            raise BlockingIOError("another process brings it")
        try:
            self.have = held(self._partial, files)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def path(self, number: int) -> Path:
        """Where the bytes of `have` are of this file."""
        return self._partial / CHECKPOINT / self._files[number].name

    def begin(self) -> None:
        """Makes room, and takes over the text files.

        Raises:
            ServerlessLLMError, OSError: the disk or its tier is full.
        """
        (self._partial / URL).write_text(self.url)
        root = self._whole.parent.parent
        DiskTier(root, os.environ.get(VARIABLE)).make_room(self.url, self._files, self._partial)
        fresh = self._partial / f"{RECORD}.new"
        self._record = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        texts = [(number, file) for number, file in enumerate(self._files) if not file.name.endswith(SUFFIX)]
        for number, file in texts:
            shutil.copyfile(self._whole / CHECKPOINT / file.name, self.path(number))
        self.commit([*self.have, *(Range(number, 0, file.size) for number, file in texts if file.size)])
        fresh.rename(self._partial / RECORD)

    def write(self, number: int, start: int, data: memoryview) -> None:
        """Bytes at `start` of the file of this number."""
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self.path(number), os.O_WRONLY)
        while data:
            count = os.pwrite(self._descriptors[number], data, start)
            data, start = data[count:], start + count

    def commit(self, ranges: Sequence[Range]) -> None:
        """What was written counts from now on, whatever happens."""
        for number in {one.file for one in ranges}:
            sync(self.path(number))
        os.write(self._record, "".join(f"{one.file} {one.start} {one.stop}\n" for one in ranges).encode())
        os.fsync(self._record)

    def end(self) -> None:
        """Makes the version whole if nothing is missing.

        Raises:
            ServerlessLLMError, OSError: as `DiskTier.finish`.
        """
        sizes = [file.size for file in self._files]
        if not missing(held(self._partial, self._files), sizes, max(sizes)):
            DiskTier(self._whole.parent.parent).finish(self._source, self._files, self._partial, self._whole)

    def close(self) -> None:
        for descriptor in (*self._descriptors.values(), self._record, self._lock):
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
    _, files = found
    place = directory.parent
    weights = {number for number, file in enumerate(files) if file.name.endswith(SUFFIX)}
    partial = place.with_name(place.name + PARTIAL)
    try:
        there = held(partial, files)
    except OSError as error:
        raise TransientError(f"{partial / RECORD}: {error.strerror}") from error
    came = sum(one.stop - one.start for one in there if one.file in weights)
    return sum(files[number].size for number in weights) - came
