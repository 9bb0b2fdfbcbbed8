"""Where a load finds the bytes of a checkpoint that was announced and is not whole: on the disk in part,
else on its server.

What comes from the server lands in the pool's slots, and is handed on to be written to the disk tier (`behind`), from
the slots where somebody holds them for it.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from serverless_llm.errors import CheckpointError, ConfigurationError, TransientError
from serverless_llm.loader import announce
from serverless_llm.loader.behind import Behind
from serverless_llm.loader.download import CONNECTIONS, Piece
from serverless_llm.loader.filling import Filling
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.ranges import Ranges
from serverless_llm.loader.remote import ChangedError, MissingError, Remote, RemoteFile, Told
from serverless_llm.loader.source import Came, Opened, Source
from serverless_llm.loader.staging import Staging

SILENCE = timedelta(seconds=3)  # times `remote.TRIES`, it is less than a load may go without progress
CHUNK = 256 << 10  # bytes that are handed on at a time, at least: what a crash loses of each range
SLOWEST = 100e3  # bytes per second over all connections, of a server that is worth waiting for: what a cap is at least
LONGEST = timedelta(seconds=CONNECTIONS * CHUNK / SLOWEST)  # of one answer: at that rate it hands on a chunk just so
log = logging.getLogger(__name__)
Writers = WeakValueDictionary[Path, Behind]  # of a pool's loads, by directories: who wrote to it last


class Origin:
    """Of one load. Its methods may be called from any thread. The disk is not touched before a file is opened."""

    def __init__(self, directory: Path, url: str, files: Sequence[RemoteFile]) -> None:
        """Raises:
        ConfigurationError: as `Remote`.
        """
        self.url = url
        self._directory = directory
        self._listed = files
        self._files = {file.name: (number, file) for number, file in enumerate(files)}
        self._source = Remote(url, SILENCE, LONGEST)
        self._writers = Writers()
        self._filling: Filling | None = None
        self._behind: Behind | None = None
        self._written: Callable[[], None] | None = None  # until a writer has it
        self._closed = self._over = False
        self._users = 0  # files that are open and may be read from the disk
        self._lock = threading.Lock()  # guards changes of these; never held while the disk is waited for
        self._began = False
        self._beginning = threading.Lock()  # guards `_began`; taken before `_lock`

    def sources(self, manifest: Manifest, pacer: Pacer, ranges: Ranges, writers: Writers) -> list[Source]:
        """The files of weights, as a reader wants them; what the server is asked for waits for the pacer, and `ranges`
        learn from its answers. What the last of `writers` has left is written first."""
        self._writers = writers
        return [RemoteSource(self, file.name, file.size, pacer, ranges) for file in manifest.files]

    def hold(self, written: Callable[[], None]) -> None:
        """What lands, and what of the same landed for others, stays there until `written` is called, once, by any
        thread: after `close`, `give_up`, or a failure of the disk. Before the first read."""
        self._written = written

    def give_up(self) -> None:
        """What lands may leave: what the disk tier lacks of it is not written."""
        with self._lock:
            if self._behind is not None:
                self._behind.give_up()
            self._leave_be()

    def close(self) -> None:
        """The load is over: files that are open stay so, later ones are read from the server alone. Idempotent."""
        with self._lock:
            self._closed = True
            self._let_go()

    def enter(self) -> bool:
        """Whether the disk tier may be read until `leave`."""
        with self._beginning:
            if not self._began and not self._closed:
                self._began = True
                self._begin()
        with self._lock:
            if self._behind is None or self._over:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._let_go()

    def _begin(self) -> None:
        last = self._writers.get(self._directory)
        held = self._written is not None
        left = last.hand_over(held) if last is not None else []
        try:
            filling = Filling(self._directory, self._source, self._listed)
        except BlockingIOError:
            log.info("%s: others fill the disk tier", self.url)
        except OSError as error:
            log.warning("%s: what comes is not kept on the disk: %s", self.url, error)
        else:
            with self._lock:
                if held and self._written is None:  # it was given up meanwhile
                    left = []
                self._filling, self._behind = filling, Behind(filling, self._written, left)
                self._writers[self._directory], self._written = self._behind, None
                self._let_go()  # it may have been closed meanwhile

    def _let_go(self) -> None:
        """Another process may use or remove what is in the disk tier, once all is written. Caller holds `_lock`."""
        if self._closed and not self._users:
            self._over = True
            if self._behind is not None:
                self._behind.close()
            self._leave_be()

    def _leave_be(self) -> None:
        """Where no writer began, none will refer to what lands. Caller holds `_lock`."""
        if self._written is not None:
            self._written()
            self._written = None

    def parts(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, Piece | None]]:
        """A range of a file as (start, stop, the piece that the disk has it in)."""
        number, _ = self._files[name]
        have = self._filling.have if self._filling else []
        for at in range(bisect_right(have, (number, start), key=lambda one: (one.file, one.stop)), len(have)):
            one = have[at]
            if one.file != number or one.start >= stop:
                break
            if start < one.start:
                yield start, one.start, None
                start = one.start
            yield start, min(stop, one.stop), one
            start = min(stop, one.stop)
        if start < stop:
            yield start, stop, None

    def read(self, piece: Piece) -> memoryview | None:
        """What the disk has; None where it is damaged."""
        assert self._filling is not None
        return self._filling.read(piece)

    def ask(self, name: str, start: int, stop: int, told: Told) -> Iterator[memoryview]:
        """A range of a file from the server; `told`: as of `Remote.read`.

        Raises:
            CheckpointError: the server has another file by now, or none.
            TransientError: the server fails.
        """
        _, file = self._files[name]
        try:
            for chunk in self._source.read(file, start, stop, CHUNK, told):
                yield memoryview(chunk)
        except (ChangedError, MissingError) as error:
            why = "was changed" if isinstance(error, ChangedError) else "was removed"
            raise CheckpointError(f"{self.url}/{name} {why} after it was deployed: deploy it again") from error
        except TransientError as error:
            raise TransientError(f"{error}; what came is kept, the next start asks for the rest") from error

    def keep(self, name: str, start: int, data: memoryview, landed: Sequence[memoryview]) -> None:
        """Bytes at `start` of a file, and where they landed, are for the disk."""
        if self._behind is not None:
            self._behind.put(self._files[name][0], start, data, landed)


class RemoteSource(NamedTuple):
    """A file of an origin."""

    origin: Origin
    name: str
    size: int
    pacer: Pacer
    ranges: Ranges

    @property
    def longest(self) -> int:
        return self.ranges.nbytes

    @property
    def path(self) -> str:
        return f"{self.origin.url}/{self.name}"

    def open(self) -> Opened:
        return RemoteOpened(self)


class RemoteOpened:
    """One file of an origin while it is read, each byte from where it is."""

    def __init__(self, file: RemoteSource) -> None:
        self._file = file
        self._local = file.origin.enter()

    def check(self) -> None:
        """Every answer of the server was held against the file that was deployed."""

    def read(self, buffers: Sequence[memoryview], offset: int, length: int, staging: Staging | None = None) -> Came:
        """Fills the buffers with `length` bytes from `offset`.

        Raises:
            CheckpointError: as `Origin.ask`.
            TransientError: the server fails.
        """
        origin, name = self._file.origin, self._file.name
        came = Came()
        for start, stop, piece in self._parts(offset, offset + length):
            if piece is not None and (data := origin.read(piece)) is not None:
                _copy(data[start - piece.start :], _cut(buffers, start - offset, stop - offset))
                came += Came(disk=stop - start)
                continue
            came += Came(remote=stop - start)
            self._file.pacer.wait(stop - start)
            for data in origin.ask(name, start, stop, self._file.ranges.observe):
                landed = _cut(buffers, start - offset, start - offset + len(data))
                _copy(data, landed)
                origin.keep(name, start, data, landed)
                start += len(data)
        return came

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, Piece | None]]:
        return self._file.origin.parts(self._file.name, start, stop) if self._local else iter([(start, stop, None)])

    def close(self) -> None:
        if self._local:
            self._file.origin.leave()


def _cut(buffers: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes `start` to `stop` of the buffers, one after another."""
    views, at = [], 0
    for buffer in buffers:
        first, last = max(start - at, 0), min(stop - at, len(buffer))
        if first < last:
            views.append(buffer[first:last])
        at += len(buffer)
    return views


def _copy(data: memoryview, views: Sequence[memoryview]) -> None:
    at = 0
    for view in views:
        view[:] = data[at : at + len(view)]
        at += len(view)


def of(directory: Path) -> Origin | None:
    """Where a directory's bytes are if they are not all in it.

    Raises:
        CheckpointError: as `announce.announced`, or this process lacks what it takes to ask the server.
    """
    found = announce.announced(directory)
    try:
        return Origin(*found) if found else None
    except ConfigurationError as error:
        raise CheckpointError(str(error)) from error
