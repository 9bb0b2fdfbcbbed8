"""The disk tier fills behind a load that reads from a server: what came is written while the next bytes come.

The load waits for none of it. What stays in DRAM is written from there, however slow the disk is; of what does not,
`WAITING` bytes are kept. What the disk does not take is dropped, and at the end the log has how much: that part of the
version is asked for again another time, or by `serverless-llm pull`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

from serverless_llm.errors import CheckpointError, ServerlessLLMError
from serverless_llm.loader.filling import Filling, lacking
from serverless_llm.quantities import size

WAITING = 128 << 20  # bytes: a second of a fast disk; this much memory is used beside the pool
BATCH = 32 << 20  # bytes that are made to last at once: who gives up waits for these alone, once the tier has room
HANDING_S = 3.0  # for a writer to end what it is writing; less than a load may go without progress
log = logging.getLogger(__name__)


class _Chunk(NamedTuple):
    """Bytes at `start` of the file of this number."""

    file: int
    start: int
    data: memoryview


class Behind:
    """Writes to one version, on a thread of its own, which holds it until `close`.

    `written`: called once, there, when nothing that was put is referred to any more: until then it may be written from
    where it is. None: what is put is kept here, as far as there is room.
    `left`: by the last writer, which goes first.
    """

    def __init__(
        self, filling: Filling, written: Callable[[], None] | None = None, left: Sequence[_Chunk] = ()
    ) -> None:
        self._filling = filling
        self._written = written
        self._chunks = deque(left)
        self._waiting = _nbytes(left)
        self._takes = True
        self._dropped = False
        self._closed = False
        self._wake = threading.Condition()  # guards all of these
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more
            filling.close()
            raise

    def put(self, file: int, start: int, data: memoryview, landed: Sequence[memoryview]) -> None:
        """Takes the bytes, unless the disk is behind already: from `landed`, where `data` was copied to and stays if
        there is somebody to be told when it was written. Never waits."""
        with self._wake:
            room = self._written or self._waiting + len(data) <= WAITING
            if not self._takes or self._closed or not room:
                self._dropped = True
                return
            for view in landed if self._written else [data]:
                self._chunks.append(_Chunk(file, start, view))
                self._waiting += len(view)
                start += len(view)
            self._wake.notify()

    def give_up(self) -> None:
        """What waits for the disk is dropped."""
        with self._wake:
            self._takes = False
            self._chunks.clear()
            self._wake.notify()

    def hand_over(self, held: bool) -> list[_Chunk]:
        """What the disk lacks, for the version's next writer, once the load is over; of slots, if they are `held` for
        that one, too. Waits for the end of what is being written, unless that takes too long."""
        with self._wake:
            if not self._closed:
                return []
            left = [*self._chunks] if held or not self._written else []
            self._waiting -= _nbytes(left)
            self.give_up()
        self._thread.join(HANDING_S)
        return left

    def close(self) -> None:
        """Nothing comes any more, and nobody reads of what is there. What came is still written."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        with closing(self._filling):
            try:
                filled = self._succeeds(self._fill)
            finally:
                self._leave()
            if filled:
                self._succeeds(self._filling.end)  # only now: it may take the folder away that the load reads
            if self._dropped or self._waiting:
                self._tell()

    def _succeeds(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except (ServerlessLLMError, OSError) as error:
            why = str(error)  # not itself, which a log may keep: its frames refer to what was put
            log.warning("%s: what comes is not kept on the disk: %s", self._filling.url, why)
            return False
        return True

    def _leave(self) -> None:
        """Refers to nothing that was put from here on; waits for the end of the load."""
        with self._wake:
            self._takes = False
            self._chunks.clear()
        if self._written:
            self._written()
        with self._wake:
            self._wake.wait_for(lambda: self._closed)

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
                self._waiting -= _nbytes(chunks)

    def _next(self) -> list[_Chunk]:
        """The first `BATCH` bytes of what came, or the first chunk; waits for something. Empty at the end."""
        chunks: list[_Chunk] = []
        nbytes = 0
        with self._wake:
            self._wake.wait_for(lambda: self._chunks or self._closed or not self._takes)
            while self._chunks and (not chunks or nbytes + len(self._chunks[0].data) <= BATCH):
                chunks.append(self._chunks.popleft())
                nbytes += len(chunks[-1].data)
        return chunks

    def _write(self, chunks: Sequence[_Chunk]) -> None:
        """They count once they are on the disk."""
        for one in sorted(chunks, key=lambda one: one[:2]):
            self._filling.write(one.file, one.start, one.data)
        self._filling.commit()


def _nbytes(chunks: Iterable[_Chunk]) -> int:
    return sum(len(one.data) for one in chunks)
