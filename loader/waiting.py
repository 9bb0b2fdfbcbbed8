"""One replica's wait for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serverless_llm.domain import ReplicaId
from serverless_llm.errors import CheckpointError
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.reader import Batch
from serverless_llm.loader.ring import Ring
from serverless_llm.loader.routes import Route
from serverless_llm.loader.sharing import Lent

if TYPE_CHECKING:
    from serverless_llm.loader.pipeline import Pipeline


@dataclass(eq=False, slots=True)
class Load:
    """One replica's wait for a checkpoint, made by `Pipeline.load`.

    `on_landed(spans, last)` is called with every span once, in any order; `last`: all bytes are there.
    `on_failed(error)` ends it instead; only a `TransientError` is worth another try. Neither is called after `cancel`.

    Attributes:
        total, done: bytes to be in DRAM, and in DRAM.
        queue_s: seconds from `Pipeline.load` to the first read; disk_s: from there to the last byte.
        lent: what of it other checkpoints have.
        disk_bytes, cache_bytes, dram_bytes: where `done` came from, as in `domain.LoadPhases`.
    """

    manifest: Manifest
    holder: ReplicaId
    on_landed: Callable[[Sequence[Landed], bool], None]
    on_failed: Callable[[CheckpointError], None]
    priority: int
    total: int
    begun: float
    lent: Lent
    done: int = 0
    queue_s: float = 0.0
    disk_s: float = 0.0
    disk_bytes: int = 0
    cache_bytes: int = 0
    dram_bytes: int = 0
    _pipeline: Pipeline = field(kw_only=True)
    _slots: dict[Piece, int] = field(kw_only=True)
    _route: Route = field(kw_only=True)
    _origin: Origin | None = field(kw_only=True)
    _borrowed: Sequence[Landed] = field(kw_only=True)
    _ring: Ring | None = None

    @property
    def ringed(self) -> bool:
        """Not all of it is in DRAM at once: who copies it says so by `copied`."""
        return self._ring is not None

    def start(self) -> None:
        """Tells of the spans that are there, at once, and of the others as they land."""
        self._pipeline._join(self)
        if self._ring:
            self._ring.turn()

    def copied(self, nbytes: int) -> None:
        """The device has copied so many bytes of the spans it was told of, in that order."""
        if self._ring:
            self._ring.copied(nbytes)

    def hasten(self, priority: int) -> None:
        """Its bytes go before those of higher numbers from now on."""
        self.priority = priority
        self._pipeline._rank(self.manifest.checkpoint)
        if self._ring:
            self._ring.hasten(priority)

    def cancel(self) -> None:
        """Stops reading unless others wait for the same. The lease stays until `Pipeline.release`. Idempotent."""
        if self._ring:
            self._ring.cancel()
        self._pipeline._leave(self)
        self._part()

    def _tell(self, spans: Sequence[Landed]) -> None:
        self.done += sum(span.length for span in spans)
        if self._ring:
            self._ring.show(spans)
        if self.done == self.total:
            self._part()
        self.on_landed(spans, self.done == self.total)

    def _part(self) -> None:
        """It asks its server for nothing more."""
        if self._origin is not None:
            self._origin.close()

    def _forward(self, batch: Batch) -> None:
        self.disk_bytes += batch.disk_bytes
        self.cache_bytes += batch.cache_bytes
        self._tell(batch.landed)
