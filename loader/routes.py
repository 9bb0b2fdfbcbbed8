"""By which reader bytes come that a load lacks, and over which link: the disk's, or the network's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import plan
from serverless_llm.loader.download import CONNECTIONS
from serverless_llm.loader.link import Link
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.origin import Origin, Writers
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.ranges import Ranges
from serverless_llm.loader.reader import Reader
from serverless_llm.loader.source import Came, Source, SourceFile

STUCK_S = 30.0  # a link of 10 Mb/s brings the first calls of all connections in less; a silent server is told of before
CALL_BYTES = 8 << 20  # of a server; a longer range gains nothing


class Route(NamedTuple):
    """`files`: as `reader` takes them."""

    reader: Reader
    link: Link
    files: Sequence[Source]


class Routes:
    """Those of one pool. Everything runs on the thread that owns the tier.

    `rate`: cap in bytes per second on what servers send, 0: none; that of the disk is the reader's.

    Attributes:
        disk, remote: the disk, and servers of sources, as finished loads saw them.
    """

    def __init__(self, pool: Pool, reader: Reader, rate: float = 0.0) -> None:
        self.disk, self.remote = Link(), Link()
        self._pool = pool
        self._reader = reader
        self._pacer = Pacer(rate)
        self._ranges: dict[str, Ranges] = {}  # by server
        self._network: Reader | None = None  # most nodes need none
        self._awaited: set[int] = set()
        self._writers: Writers = Writers()

    def of(self, manifest: Manifest, origin: Origin | None) -> Route:
        """`origin`: where the files are that are not on the disk."""
        if origin is not None:
            longest = plan.paced(self._pacer.rate, CALL_BYTES)
            ranges = self._ranges.setdefault(urlsplit(origin.url).netloc, Ranges(longest))
            return Route(self._asker(), self.remote, origin.sources(manifest, self._pacer, ranges, self._writers))
        files = [SourceFile(file.path, file.size, file.mtime_ns) for file in manifest.files]
        return Route(self._reader, self.disk, files)

    def yield_to(self, number: int) -> None:
        """As `Reader.yield_to`: over which link its bytes come is not known yet."""
        self._awaited.add(number)
        for reader in self._readers():
            reader.yield_to(number)

    def go_on(self, number: int) -> None:
        """As `Reader.go_on`."""
        self._awaited.discard(number)
        for reader in self._readers():
            reader.go_on(number)

    def _readers(self) -> list[Reader]:
        return [self._reader, self._network] if self._network else [self._reader]

    def observe(self, route: Route, came: Came, seconds: float) -> None:
        """What a transfer brought, to each link that it crossed; under a cap the page cache's bytes cross the disk's.

        `seconds` that it was busy, 0 where they tell nothing of a link; nor do they where not all came over its own.
        """
        disk = came.disk + (came.cache if self._reader.rate else 0)
        for link, nbytes in ((self.remote, came.remote), (self.disk, disk)):
            link.observe(nbytes, seconds if link is route.link and nbytes == came.total else 0.0)

    def vouches(self, route: Route, error: CheckpointError) -> bool:
        """Whether what landed before is what was asked for: a server that fails has answered for each byte."""
        return route.link is self.remote and isinstance(error, TransientError)

    def close(self) -> bool:
        """
        Returns:
            False when a server keeps a read waiting: it may still write to the pool.
        """
        self._pacer.stop()
        return self._network is None or self._network.close()

    def _asker(self) -> Reader:
        """Reads from servers."""
        if self._network is None:
            self._network = Reader(self._pool, CONNECTIONS, staged=False, stuck_s=STUCK_S)
            for number in self._awaited:
                self._network.yield_to(number)
        return self._network
