"""The disk tier fills behind a load that reads from a server: what came is written while the next bytes come.

The load waits for none of it. Where the disk is full, or so slow that more than `WAITING` bytes would wait for it, what
comes is dropped, and at the end the log has how much: that part of the version is asked for again another time, or by
`serverless-llm pull`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from serverless_llm.errors import CheckpointError, ServerlessLLMError
from serverless_llm.loader.download import Range
from serverless_llm.loader.filling import Filling, lacking
from serverless_llm.quantities import size

WAITING = 128 << 20  # bytes: a second of a fast disk; this much memory is used beside the pool
log = logging.getLogger(__name__)


class _Chunk(NamedTuple):
    """Bytes at `start` of the file of this number, kept until they are written."""

    file: int
    start: int
    data: memoryview


class Behind:
    """Writes to one version, on a thread of its own, which holds it until `close`."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling
        self._chunks: deque[_Chunk] = deque()
        self._waiting = 0  # bytes
        self._takes = True
        self._dropped = False
        self._closed = False
        self._wake = threading.Condition()  # guards all of these
        threading.Thread(target=self._run, name="behind", daemon=True).start()

    def put(self, file: int, start: int, data: memoryview) -> None:
        """Keeps the bytes, unless the disk is behind already. Never waits."""
        with self._wake:
            if self._takes and not self._closed and self._waiting + len(data) <= WAITING:
                self._chunks.append(_Chunk(file, start, data))
                self._waiting += len(data)
                self._wake.notify()
            else:
                self._dropped = True

    def close(self) -> None:
        """Nothing comes any more, and nobody reads of what is there. What came is still written."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._fill()
        except (ServerlessLLMError, OSError) as error:
            log.warning("%s: what comes is not kept on the disk: %s", self._filling.url, error)
        finally:
            with self._wake:
                self._takes = False
                self._chunks.clear()
                self._wake.wait_for(lambda: self._closed)
                dropped = self._dropped or self._waiting > 0
            if dropped:
                self._tell()
            self._filling.close()

    def _tell(self) -> None:
        """What the disk lacks, and what brings it."""
        url = self._filling.url
        try:
            missing = size(lacking(self._filling.directory))
        except CheckpointError as error:
            log.warning("%s: what came is not all on the disk: %s", url, error)
            return
        log.warning(
            "%s: %s are not on the disk, which failed or was slower than the network; "
            "the next start asks for them, and serverless-llm pull %s brings them", url, missing, url,
        )  # fmt: skip

    def _fill(self) -> None:
        begun = False
        while chunks := self._next():
            if not begun:
                self._filling.begin()
                begun = True
            self._write(chunks)
            with self._wake:
                self._waiting -= sum(len(one.data) for one in chunks)
        self._filling.end()

    def _next(self) -> list[_Chunk]:
        """All that came; waits for something. Empty at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._chunks or self._closed)
            chunks = list(self._chunks)
            self._chunks.clear()
            return chunks

    def _write(self, chunks: Sequence[_Chunk]) -> None:
        """They count once they are on the disk."""
        for one in chunks:
            self._filling.write(one.file, one.start, one.data)
        self._filling.commit([Range(one.file, one.start, one.start + len(one.data)) for one in chunks])
