"""Files that are written past the page cache where their file system allows, through it elsewhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE = 4096  # what writes past the page cache begin and end with, in the file and in memory


class Written:
    """One such file, which is there."""

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
