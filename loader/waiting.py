"""One replica's wait for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serverless_llm.domain import ReplicaId
from serverless_llm.errors import CheckpointError
from serverless_llm.loader.link import Rank
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.reader import Batch
from serverless_llm.loader.ring import Ring
from serverless_llm.loader.routes import Route
from serverless_llm.loader.sharing import Lent
from serverless_llm.loader.source import Came

if TYPE_CHECKING:
    from serverless_llm.loader.pipeline import Pipeline


@dataclass(eq=False, slots=True)
class Load:
    """One replica's wait for a checkpoint, made by `Pipeline.load`.

    `on_landed(spans, last)` is called with every span once, in any order; `last`: all bytes are there.
    `on_failed(error)` ends it instead; only a `TransientError` is worth another try. Neither is called after `cancel`.

    Attributes:
        total, done: bytes to be in DRAM, and in DRAM.
        lent: what of it other checkpoints have; borrowed: the same as spans.
        slots: of its own pieces; what has none passes through `ring`.
        queue_s: seconds from `Pipeline.load` to the first read; read_s: from there to the last byte.
        came: where those of `done` were that the DRAM tier lacked; dram_bytes: those that it had.
    """

    pipeline: Pipeline
    manifest: Manifest
    holder: ReplicaId
    on_landed: Callable[[Sequence[Landed], bool], None]
    on_failed: Callable[[CheckpointError], None]
    priority: int
    total: int
    begun: float
    lent: Lent
    borrowed: Sequence[Landed]
    slots: dict[Piece, int]
    route: Route
    origin: Origin | None
    ring: Ring | None = None
    done: int = 0
    queue_s: float = 0.0
    read_s: float = 0.0
    came: Came = field(default_factory=Came)
    dram_bytes: int = 0

    @property
    def ringed(self) -> bool:
        """Not all of it is in DRAM at once: who copies it says so by `copied`."""
        return self.ring is not None

    def start(self) -> None:
        """Tells of the spans that are there, at once, and of the others as they land."""
        self.pipeline.join(self)
        if self.ring:
            self.ring.fill()

    def copied(self, nbytes: int) -> None:
        """The device has copied so many bytes of the spans it was told of, in that order."""
        if self.ring:
            self.ring.copied(nbytes)

    @property
    def rank(self) -> Rank:
        return Rank(self.priority, self.holder)

    def hasten(self, priority: int) -> None:
        """Its bytes go before those of higher ranks from now on."""
        self.priority = priority
        self.pipeline.rank(self.manifest.checkpoint)
        if self.ring:
            self.ring.hasten(self.rank)

    def cancel(self) -> None:
        """Stops reading unless others wait for the same. The lease stays until `Pipeline.release`. Idempotent."""
        if self.ring:
            self.ring.cancel()
        self.pipeline.leave(self)
        self._part()

    def tell(self, spans: Sequence[Landed]) -> None:
        """These have landed for it."""
        self.done += sum(span.length for span in spans)
        if self.ring:
            self.ring.show(spans)
        if self.done == self.total:
            self._part()
            self.pipeline.complete(self)
        self.on_landed(spans, self.done == self.total)

    def _part(self) -> None:
        """It asks its server for nothing more."""
        if self.origin is not None:
            self.origin.close()

    def forward(self, batch: Batch) -> None:
        """These have been read for it."""
        self.came += batch.came
        self.tell(batch.landed)
