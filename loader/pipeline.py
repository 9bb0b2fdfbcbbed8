"""One checkpoint's way from disk into the DRAM tier, told to everyone who waits for it.

Everything here runs on the thread that owns the tier (the agent's event loop); reader threads only `post` to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from serverless_llm.domain import CheckpointId, ReplicaId
from serverless_llm.errors import CapacityError, CheckpointError
from serverless_llm.loader import division, plan
from serverless_llm.loader.ahead import Ahead
from serverless_llm.loader.drain import Drain
from serverless_llm.loader.lending import Lending
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.plan import Landed, Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Batch, Reader, Transfer
from serverless_llm.loader.residency import ByteCost, Tier, equal
from serverless_llm.loader.ring import Ring
from serverless_llm.loader.routes import Route, Routes
from serverless_llm.loader.sharing import NOTHING, Lent, Loan
from serverless_llm.loader.source import Came
from serverless_llm.loader.waiting import Load

AHEAD = 1 << 30  # bytes
PAUSE = 2.0  # seconds, in which a model that was loaded has its first tokens
Post = Callable[[Callable[[], None]], object]  # loop.call_soon_threadsafe


@dataclass(eq=False, slots=True)
class _Fill:
    """A checkpoint on its way into the tier, with those who wait for it.

    `parts`: landed spans of pieces that have not landed whole; `left`: bytes of this transfer to come. While
    `cancelled`, a read may still be in flight; who joins then is told when it has returned. `distrusted`: pieces that
    are to be read again.
    """

    loads: list[Load]
    route: Route
    transfer: Transfer
    left: int
    parts: dict[Piece, list[Landed]] = field(default_factory=dict)
    cancelled: bool = False
    distrusted: set[Piece] = field(default_factory=set)
    came: Came = field(default_factory=Came)


class Pipeline:
    """Ties the tier's books, the pool and the reader together. `post` runs a callable on the owner's thread.

    When nothing was loaded for `pause` seconds, free slots are made ready ahead of need: `ahead` bytes of them, or as
    many as the largest checkpoint so far had. `freed` is called when others may find room that had none. `remote_rate`:
    cap in bytes per second on what servers of sources send, 0: none. `byte_s`: by it the tier chooses who leaves.

    Attributes:
        disk, remote: the disk, and servers of sources, as finished loads saw them.
        lending: what loads may borrow.
        loads: how many have begun: while there are no more, no slot is given to another piece.
    """

    def __init__(
        self,
        pool: Pool,
        tier: Tier,
        reader: Reader,
        post: Post,
        ahead: int = AHEAD,
        pause: float = PAUSE,
        freed: Callable[[], None] = lambda: None,
        remote_rate: float = 0.0,
        byte_s: ByteCost = equal,
    ) -> None:
        self._routes = Routes(pool, reader, remote_rate)
        self.disk, self.remote = self._routes.disk, self._routes.remote
        self.lending = Lending(tier)
        self.loads = 0
        self.tier = tier
        self._pool = pool
        self._post = post
        self._freed = freed
        self._byte_s = byte_s
        self._fills: dict[CheckpointId, _Fill] = {}
        self._rings: dict[ReplicaId, Ring] = {}
        self._drain = Drain(tier, post, self.release)
        self._ahead = Ahead(pool, tier, post, pause, lambda: not self._fills)
        self.tier.wanted = ahead // pool.slot_bytes
        self._ahead.trim()

    @property
    def settling(self) -> bool:
        """`freed` will be called though nobody releases anything more."""
        return bool(self._fills or self.tier.lent or self._drain.giving_up)

    def fits(self, manifest: Manifest, ring: bool = False) -> bool:
        """Whether the checkpoint could be loaded through an otherwise empty pool."""
        return division.least(manifest, self._pieces(manifest), ring) <= self.tier.slots

    def load(
        self,
        manifest: Manifest,
        holder: ReplicaId,
        on_landed: Callable[[Sequence[Landed], bool], None],
        on_failed: Callable[[CheckpointError], None],
        priority: int = 0,
        ring: bool = False,
        origin: Origin | None = None,
        loan: Loan | None = None,
    ) -> Load:
        """Reserves the checkpoint's slots, leased to `holder` until `release`. `start` the load next.

        Args:
            priority: lower goes first; of equal ones the lower holder.
            ring: `holder` copies what it is told of, so that slots may be used again: where there are too few, the
                headers and what finds free slots stay in the tier, and all else passes through a ring.
            origin: where the files are that are not on the disk; the load closes it at its end. Of what has slots, it
                fills the disk tier from there: they are leased until it has, or others find no room.
            loan: what of it other checkpoints have in the tier, found in this turn of the loop; leased from them, too.
                The load tells of it as of files that are numbered on from its own. Where there is no room, the disk
                keeps its leases: there may be some without.

        Raises:
            CapacityError: it does not fit beside what is leased; `fits` tells whether it ever could.
        """
        begun = time.monotonic()
        route = self._routes.of(manifest, origin)
        self.loads += 1
        spared = loan.spared if loan else frozenset[Piece]()
        pieces = [piece for piece in self._pieces(manifest) if piece not in spared]
        reading = manifest.checkpoint in self._fills  # others wait for what has a slot now, and for no more
        borrowed = self.lending.borrow(loan, holder) if loan else []
        try:
            kept, passing, width = division.divide(self.tier, manifest, pieces, ring, reading)
            lent = self.tier.lend(manifest.checkpoint, width, self._byte_s)
        except CapacityError:
            self.lending.repay(holder, begun)
            if loan is None:
                self._drain.reclaim()
            raise
        slots = self.tier.reserve(manifest.checkpoint, kept, begun, self._byte_s).slots
        self.tier.lease(manifest.checkpoint, holder)
        self.tier.wanted = max(self.tier.wanted, len(pieces))
        total = sum(piece.length for piece in pieces) + sum(span.length for span in borrowed)
        load = Load(
            self, manifest, holder, on_landed, on_failed, priority, total, begun,
            Lent(loan.sizes, loan.runs, total) if loan else NOTHING, borrowed,
            slots, route, origin,
        )  # fmt: skip
        if passing:
            load.ring = self._rings[holder] = self._ring(load, passing, lent)
        elif origin is not None:
            self._drain.begin(manifest.checkpoint, origin)
        return load

    def release(self, checkpoint: CheckpointId, holder: ReplicaId) -> None:
        """`holder` refers to no byte of the checkpoint in the pool any more. Idempotent."""
        ring = self._rings.pop(holder, None)
        if ring is not None:
            ring.release()
        now = time.monotonic()
        self.lending.repay(holder, now)
        self.tier.release(checkpoint, holder, now)
        self._ahead.trim()
        self._freed()

    def forget(self, checkpoint: CheckpointId) -> None:
        """No model names the checkpoint any more: it leaves with its last lease, its memory slot by slot."""
        self.tier.forget(checkpoint)
        self._ahead.trim()

    @property
    def quiet(self) -> bool:
        """Nothing is read, nor was a moment ago."""
        return not self._fills and not self._rings and self._ahead.rested

    def discard(self, manifest: Manifest, spans: Iterable[Landed]) -> bool:
        """The bytes of these spans are not to be trusted: the next load reads them again.

        Returns:
            False: not before the reading of others of the checkpoint has ended.
        """
        sizes = [file.size for file in manifest.files]
        pieces = {plan.home(Piece(*span[:3]), sizes[span.file], self._pool.slot_bytes) for span in spans}
        return self._distrust(manifest.checkpoint, pieces)

    def yield_to(self, holder: ReplicaId) -> None:
        """What ranks after this one's load, which somebody waits for, begins no read until `go_on`."""
        self._routes.yield_to(holder)

    def go_on(self, holder: ReplicaId) -> None:
        """It has begun, or will not soon. Idempotent."""
        self._routes.go_on(holder)

    def close(self) -> bool:
        """Before the pool is closed: no memory is taken or given back any more.

        Returns:
            False when a server keeps a read waiting, or the disk tier a write: they may still use the pool.
        """
        self._ahead.close()
        returned = self._routes.close()
        return self._drain.close() and returned

    def _pieces(self, manifest: Manifest) -> list[Piece]:
        return plan.pieces(manifest.files, (), self._pool.slot_bytes)

    # --- what is larger than the room for it ---

    def _ring(self, load: Load, pieces: list[Piece], slots: list[int]) -> Ring:
        route = load.route

        def told(batch: Batch) -> None:
            self._ahead.rest()
            self._routes.observe(route, batch.came, 0.0)  # its time is the device's, too
            if batch.error is not None:
                checkpoint = load.manifest.checkpoint
                if not self._routes.vouches(route, batch.error):
                    self._distrust(checkpoint, load.slots.keys() - self.tier.borrowed(checkpoint))
                load.cancel()
                load.on_failed(batch.error)
                return
            load.queue_s = load.queue_s or max(0.0, ring.started - load.begun)
            load.read_s = time.monotonic() - load.begun - load.queue_s
            load.forward(batch)

        slot_bytes = self._pool.slot_bytes
        ring = Ring(route.reader, route.files, pieces, slots, slot_bytes, load.rank, self._post, told, self._given_back)
        return ring

    def _given_back(self, slots: Sequence[int]) -> None:
        self.tier.give_back(slots)
        self._ahead.trim()
        self._freed()

    def join(self, load: Load) -> None:
        """It is told of what is in the tier, and waits for the rest."""
        checkpoint = load.manifest.checkpoint
        self._ahead.rest()  # also where no byte is to be read
        fill = self._fills.get(checkpoint)
        if fill is not None and fill.cancelled:
            fill.loads.append(load)
            return
        missing = self.tier.missing(checkpoint, load.slots)
        if fill is None and missing:
            self.tier.read(checkpoint)
            fill = self._fills[checkpoint] = _Fill([], load.route, *self._submit(load, missing))
        if fill is not None:
            fill.loads.append(load)
            self.rank(checkpoint)
        self._tell_known(load, fill)

    def _tell_known(self, load: Load, fill: _Fill | None) -> None:
        """Tells of what is in the tier already."""
        missing = set(self.tier.missing(load.manifest.checkpoint, load.slots))
        spans = [
            Landed(piece.file, piece.offset, piece.length, self._pool.offset(slot))
            for piece, slot in load.slots.items()
            if piece not in missing
        ]
        spans += [span for parts in fill.parts.values() for span in parts] if fill else []
        spans += load.borrowed
        load.dram_bytes = sum(span.length for span in spans)
        if spans:
            load.tell(spans)

    def _submit(self, load: Load, missing: list[Piece]) -> tuple[Transfer, int]:
        checkpoint = load.manifest.checkpoint

        def deliver(batch: Batch) -> None:
            self._post(lambda: self._news(checkpoint, batch))

        transfer = Transfer(load.route.files, load.slots, missing, deliver, load.rank)
        load.route.reader.submit(transfer)
        return transfer, sum(piece.length for piece in missing)

    def rank(self, checkpoint: CheckpointId) -> None:
        """A fill is as urgent as its most urgent load."""
        fill = self._fills.get(checkpoint)
        if fill is not None and fill.loads:
            fill.route.reader.rank(fill.transfer, min(load.rank for load in fill.loads))

    def _distrust(self, checkpoint: CheckpointId, pieces: Collection[Piece]) -> bool:
        """As `discard`."""
        fill = self._fills.get(checkpoint)
        if fill is not None:
            fill.distrusted.update(pieces)
            return False
        self.tier.discard(checkpoint, pieces)
        self._ahead.trim()
        return True

    def complete(self, load: Load) -> None:
        """It refers to what has landed for it: others of its checkpoint, with less to borrow, may need more."""
        self.tier.lease(load.manifest.checkpoint, load.holder, load.slots)

    def leave(self, load: Load) -> None:
        """It waits no more; what nobody waits for is not read."""
        fill = self._fills.get(load.manifest.checkpoint)
        if fill is None or load not in fill.loads:
            return
        fill.loads.remove(load)
        if not fill.loads:
            fill.cancelled = True
            fill.route.reader.cancel(fill.transfer)
        self.rank(load.manifest.checkpoint)

    def _news(self, checkpoint: CheckpointId, batch: Batch) -> None:
        """One batch of a fill, on the owner's thread."""
        fill = self._fills[checkpoint]
        self._ahead.rest()
        if batch.error is None:
            self._land(checkpoint, fill, batch)
        if batch.last:
            del self._fills[checkpoint]
            self.tier.discard(checkpoint, fill.distrusted)
        if batch.error is not None:
            self.tier.abort(checkpoint, discard=not self._routes.vouches(fill.route, batch.error))
            for load in fill.loads:
                load.cancel()  # its ring
                load.on_failed(batch.error)
        elif not fill.cancelled:
            self._forward(fill, batch)
        elif batch.last:
            self._after_cancel(checkpoint, fill)
        self._ahead.trim()
        if batch.last:
            self._freed()

    def _land(self, checkpoint: CheckpointId, fill: _Fill, batch: Batch) -> None:
        whole = []
        for span in batch.landed:
            piece = plan.home(Piece(*span[:3]), fill.transfer.files[span.file].size, self._pool.slot_bytes)
            parts = fill.parts.setdefault(piece, [])
            parts.append(span)
            if sum(part.length for part in parts) == piece.length:
                whole.append(piece)
                del fill.parts[piece]
            fill.left -= span.length
        fill.came += batch.came
        self.tier.land(checkpoint, whole)

    def _forward(self, fill: _Fill, batch: Batch) -> None:
        if batch.last:
            self._observe(fill)
        for load in list(fill.loads):
            if load in fill.loads:  # a listener may have cancelled another
                load.forward(batch)

    def _observe(self, fill: _Fill) -> None:
        """The phases of a whole transfer, for its loads and the links."""
        transfer = fill.transfer
        self._routes.observe(fill.route, fill.came, transfer.busy)
        for load in fill.loads:
            load.queue_s = max(0.0, transfer.started - load.begun)
            load.read_s = transfer.ended - max(transfer.started, load.begun)

    def _after_cancel(self, checkpoint: CheckpointId, fill: _Fill) -> None:
        """The last read of a cancelled fill has returned: whoever joined since begins anew with what is missing."""
        if fill.left and not fill.loads:
            self.tier.abort(checkpoint)
        for load in fill.loads:
            self.join(load)
