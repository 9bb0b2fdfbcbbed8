"""The agent's checkpoint store: brings replicas to its workers through the DRAM tier, and takes them away.

A replica holds a lease on its checkpoint's slots from the start of its load until its worker has answered `Dropped`,
has copied everything (copy mode), or was reaped. Replicas of one checkpoint share its slots and one read, but for what
passes through a ring of each one's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from serverless_llm import wire
from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import digest, origin, plan
from serverless_llm.loader.link import DISK_BPS, REMOTE_BPS, Link, Priority, byte_s
from serverless_llm.loader.manifest import CHECKPOINT, Manifest
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Reader
from serverless_llm.loader.residency import Tier
from serverless_llm.node.away import Away
from serverless_llm.node.check import Check, Tally
from serverless_llm.node.manifests import Manifests
from serverless_llm.node.options import AgentOptions
from serverless_llm.node.replica import Replica
from serverless_llm.node.room import Room
from serverless_llm.node.sharing import Sharing
from serverless_llm.node.slot import Slot
from serverless_llm.node.threads import apart
from serverless_llm.node.verification import Verification
from serverless_llm.node.verifier import Verifier

log = logging.getLogger(__name__)

PROGRESS_S = 0.1  # at most one report in this time
PROGRESS_SHARE = 0.05  # ... unless this share of the bytes has landed since
PREPARED_S = 1.0  # reads are held up for so long at most, for a load that goes first and has not begun to read


class Store:
    """Everything runs on the agent's loop; `tell` sends a message to the controller."""

    def __init__(
        self, options: AgentOptions, tell: Callable[[wire.Message], None], slot: Callable[[int], Slot]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._options = options
        self._tell = tell
        self._slot = slot
        self._pool = Pool(options.dram, self._punched)
        self._reader = Reader(self._pool, rate=options.disk_rate)
        self._tier = Tier(self._pool.slots, self._pool.slot_bytes)
        self._pipeline = Pipeline(
            self._pool,
            self._tier,
            self._reader,
            loop.call_soon_threadsafe,
            freed=lambda: self._room.look_again(),
            remote_rate=options.remote_rate,
            byte_s=self._byte_s,
        )
        self._go_on = self._pipeline.go_on
        self._upload = Link()
        self._manifests = Manifests()
        self._away = Away()
        self._replicas: dict[int, Replica] = {}
        self._verifier = Verifier(self._pool, options.digests, loop.call_soon_threadsafe)
        self._sharing = Sharing(self._pool, self._pipeline, options.tensors, self._settled)
        self._room = Room(
            self._pipeline, self._sharing, self._replicas, self._copies, self._arrived, self.failed, self._go_on
        )

    @property
    def pool_fd(self) -> int:
        return self._pool.fd

    def close(self) -> None:
        """After all workers have ended."""
        for replica in self._replicas.values():
            self._stop(replica)
        self._away.close()
        idle = self._pipeline.close()
        self._verifier.close()
        self._sharing.close()
        if self._reader.close() and idle:
            self._pool.close()

    # --- what the head asks ---

    def start(self, order: wire.StartLoad) -> None:
        """Begins a load; ends in `ReplicaReady`, `LoadFailed`, or with its worker."""
        if order.replica in self._replicas:
            return
        if not self._slot(order.device).up:
            self._tell(wire.LoadFailed(order.replica, f"no worker is up on device {order.device}", permanent=False))
            return
        replica = Replica(order, time.monotonic(), Priority.ONLINE if order.online else Priority.PREFETCH)
        self._replicas[order.replica] = replica
        replica.task = asyncio.ensure_future(self._begin(replica))

    def hasten(self, number: int) -> None:
        """Somebody waits for this replica by now."""
        replica = self._replicas.get(number)
        if replica is not None:
            replica.priority = Priority.ONLINE
            if replica.load is None and replica.room is None:
                self._go_first(number)
            elif replica.load is not None:
                replica.load.hasten(Priority.ONLINE)
                self._slot(replica.order.device).send(wire.Hasten(number))

    def look(self, away: Mapping[str, str]) -> None:
        """As `Away.look`."""
        self._away.look(away)

    def unload(self, number: int) -> None:
        """Frees a replica or ends its load; `Unloaded` follows."""
        replica = self._replicas.get(number)
        if replica is None:
            self._tell(wire.Unloaded(number))
            return
        replica.leaving = True
        self._drop(replica)

    def cancel_loads(self) -> None:
        """The head that waited for them is gone. What landed stays in DRAM."""
        for replica in list(self._replicas.values()):
            if not replica.ready:
                self._drop(replica)

    def forget(self, checkpoint: str) -> None:
        self._pipeline.forget(checkpoint)
        self._manifests.forget(checkpoint)
        self._sharing.forget(checkpoint)
        self._away.forget(checkpoint)

    def _punched(self, offset: int) -> None:
        """Of a device's way to the pool's memory, that slot's is another's now."""
        for number, device in enumerate(self._options.devices):
            if device.kind == "cuda":
                self._slot(number).send(wire.Punched(offset))

    # --- what there is ---

    def replicas(self) -> list[tuple[int, int, str, str, str]]:
        """Those that serve, as in `wire.Hello`."""
        orders = [replica.order for replica in self._replicas.values() if replica.ready and not replica.dropping]
        return [(order.replica, order.device, order.model, order.checkpoint, order.dtype) for order in orders]

    def shared(self) -> list[tuple[int, int, int]]:
        """Extents of devices, as in `wire.Hello`."""
        return [(number, *extent) for number, replica in self._replicas.items() for extent in replica.shared.items()]

    def on_device(self, device: int) -> list[int]:
        """All that are there, those on their way in or out too."""
        return [number for number, replica in self._replicas.items() if replica.order.device == device]

    def resident(self) -> list[tuple[str, int]]:
        return self._tier.residents()

    def digests(self) -> list[str]:
        """The checkpoints whose digests are known."""
        return self._verifier.known()

    def own_bytes(self) -> dict[str, int]:
        """As of `Sharing`."""
        return self._sharing.own_bytes()

    def lent_bytes(self) -> dict[str, int]:
        """As of `Sharing`."""
        return self._sharing.lent_bytes()

    def away_bytes(self) -> dict[str, int]:
        """As of `Away`."""
        return self._away.bytes()

    @property
    def tally(self) -> Tally:
        return self._verifier.tally

    @property
    def used(self) -> int:
        return self._tier.used_bytes

    @property
    def bandwidth(self) -> dict[str, float]:
        """What was learned, a cap where nothing was yet."""
        learned = {name: link.bandwidth for name, link in self._links().items()}
        return self._options.limits | {link: rate for link, rate in learned.items() if rate}

    def _byte_s(self, checkpoint: str) -> float:
        known = self.bandwidth
        remote, disk = known.get("remote", REMOTE_BPS), known.get("disk", DISK_BPS)
        return byte_s(self._away.share(checkpoint), remote, disk)

    def link_bytes(self) -> dict[str, int]:
        return {name: link.bytes for name, link in self._links().items()}

    def _links(self) -> dict[str, Link]:
        return {"remote": self._pipeline.remote, "disk": self._pipeline.disk, "upload": self._upload}

    # --- a load ---

    async def _begin(self, replica: Replica) -> None:
        number = replica.order.replica
        if replica.priority == Priority.ONLINE:
            self._go_first(number)
        try:
            await self._load(replica)
        except CheckpointError as error:
            self.failed(number, str(error), not isinstance(error, TransientError))
        except Exception as error:  # the task's edge: whoever waits is told
            log.warning("replica %d: a fault that nobody foresaw", number, exc_info=error)
            self.failed(number, f"{type(error).__name__}: {error}", permanent=False)
        finally:
            self._go_on(number)

    def _go_first(self, number: int) -> None:
        """What ranks after this replica begins no read before it does, fails, or waits for room."""
        self._pipeline.yield_to(number)
        asyncio.get_running_loop().call_later(PREPARED_S, self._go_on, number)

    async def _load(self, replica: Replica) -> None:
        order = replica.order
        found = await self._manifests.of(order.source, order.checkpoint, dict(self._tier.residents()))
        known = await self._verifier.digests(found) if order.verify != "off" else None
        await self._sharing.meet(found)
        if found.directory.name == CHECKPOINT:  # all else is on a disk as a whole; a look at it may never end
            replica.origin = await apart(lambda: origin.of(found.directory))
            self._away.watch(order.checkpoint, found.directory, found.file_bytes)
        try:
            load = replica.load = await self._room.reserve(replica, found)
        except CapacityError as error:
            self.failed(order.replica, str(error), permanent=not self._room.fits(replica, found))
            return
        sample = self._verifier.sample(order.checkpoint)
        place = replica.place(load, self._pipeline.fits(found), sample, self._twins(replica))
        self._slot(order.device).send(place)
        if order.verify != "off":
            replica.check = self._check(replica, found, known)
        load.start()

    def _settled(self) -> bool:
        """No replica is on its way."""
        return all(replica.ready or replica.dropping for replica in self._replicas.values())

    def _twins(self, replica: Replica) -> list[tuple[int, int, int, int]]:
        """What it has in common with replicas on its device, where that has copies. What is verified is its own."""
        order = replica.order
        if order.verify != "off" or replica.origin or not self._copies(order.device):
            return []
        others = {
            number: other.order.checkpoint
            for number, other in self._replicas.items()
            if other.ready and not other.dropping and other.order.device == order.device
        }
        return self._sharing.twins(order.checkpoint, others)

    def _copies(self, device: int) -> bool:
        return self._options.devices[device].weights == "copy"

    def _check(self, replica: Replica, found: Manifest, known: digest.Digests | None) -> Check:
        return Verification(
            self._verifier,
            self._pipeline,
            found,
            replica,
            load=lambda: self._room.load(replica, found),
            passed=lambda spans, last: self._landed(replica, spans, last),
            failed=lambda message, permanent: self.failed(replica.order.replica, message, permanent),
        ).check(known)

    def _arrived(self, replica: Replica, spans: Sequence[Landed], last: bool) -> None:
        if replica.check is None:
            self._landed(replica, spans, last)
        else:
            replica.check.landed(spans, last)

    def _landed(self, replica: Replica, spans: Sequence[Landed], last: bool) -> None:
        assert replica.load is not None
        now = time.monotonic()
        if last:
            replica.landed = now
        device = replica.order.device
        pieces = [(*one,) for one in (spans if self._copies(device) else plan.joined(spans))]
        self._slot(device).send(wire.Landed(replica.order.replica, pieces, last))
        replica.done += sum(one.length for one in spans)
        done, total = replica.done, replica.load.total
        if now - replica.told >= PROGRESS_S or done - replica.told_bytes >= PROGRESS_SHARE * total or last:
            replica.told, replica.told_bytes = now, done
            self._tell(wire.LoadProgress(replica.order.replica, done, total))

    # --- what workers answer ---

    def placed(self, message: wire.Placed) -> None:
        """The replica serves."""
        replica = self._replicas.get(message.replica)
        if replica is None or replica.dropping or replica.load is None:
            return
        replica.ready, replica.check = True, None
        for extent, nbytes, lender in message.shared:
            for one in (replica, self._replicas.get(lender)):
                if one is not None:
                    one.shared[extent] = nbytes
        self._sharing.learn()
        load, now = replica.load, time.monotonic()
        if not message.leased:
            self._pipeline.release(replica.order.checkpoint, message.replica)
        # Beside a slower disk the uploader mostly waits: only a load from DRAM shows what it can do.
        uploaded = max(0, load.total - sum(nbytes for _, nbytes, _ in message.shared))
        alone = load.dram_bytes == load.total == uploaded
        self._upload.observe(uploaded, message.upload_s if alone else 0.0)
        self._room.look_again()
        self._tell(replica.served(load, now, message.shared))

    def failed(self, number: int, message: str, permanent: bool) -> None:
        """The replica cannot be placed, says its worker or its load."""
        replica = self._replicas.get(number)
        if replica is None:
            return
        log.warning("replica %d of %s: %s", number, replica.order.model, message)
        self._manifests.forget(replica.order.checkpoint)
        if not replica.dropping:
            self._tell(wire.LoadFailed(number, message, permanent))
        self._drop(replica)

    def compared(self, message: wire.Compared) -> None:
        """Its worker has compared the copies on the device with what it was told of."""
        tally = self._verifier.tally
        tally.bytes += message.bytes
        tally.device += message.mended + len(message.differing)
        replica = self._replicas.get(message.replica)
        if message.mended:
            log.warning(
                "replica %d: %d blocks differed on its device until they were copied again",
                message.replica,
                message.mended,
            )
        if message.differing and replica is not None and replica.load is not None:
            blocks = [Landed(*part, 0) for part in message.differing]
            differing = digest.described(replica.load.manifest.files, blocks)
            where = f"the memory of device {replica.order.device}"
            self.failed(message.replica, f"{differing}, are not in {where} what was copied there", permanent=False)

    def copied(self, number: int, nbytes: int) -> None:
        """Its worker has copied so many bytes of what it was told of."""
        replica = self._replicas.get(number)
        if replica is not None and replica.load is not None and not replica.dropping:
            replica.load.copied(nbytes)

    def dropped(self, number: int) -> None:
        """Its worker refers to none of the replica's bytes."""
        replica = self._replicas.get(number)
        if replica is not None:
            self._remove(replica)

    def worker_lost(self, device: int) -> None:
        """The worker was reaped, and all its replicas with it."""
        for replica in list(self._replicas.values()):
            if replica.order.device == device:
                self._remove(replica)

    # --- ends ---

    def _drop(self, replica: Replica) -> None:
        if replica.dropping:
            return
        replica.dropping = True
        self._stop(replica)
        if replica.load is None:
            self._remove(replica)
        else:
            self._slot(replica.order.device).send(wire.Drop(replica.order.replica))

    def _remove(self, replica: Replica) -> None:
        del self._replicas[replica.order.replica]
        self._stop(replica)
        if replica.load is not None:
            self._pipeline.release(replica.order.checkpoint, replica.order.replica)
        if replica.leaving:
            self._tell(wire.Unloaded(replica.order.replica))

    def _stop(self, replica: Replica) -> None:
        replica.room = None
        if replica.task is not None and replica.task is not asyncio.current_task():
            replica.task.cancel()
        if replica.load is not None:
            replica.load.cancel()
        if replica.check is not None:
            replica.check.cancel()
