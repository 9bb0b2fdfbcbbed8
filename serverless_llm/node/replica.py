"""What an agent knows of one replica."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from serverless_llm import wire
from serverless_llm.loader.link import Priority
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.waiting import Load
from serverless_llm.node.check import Check


@dataclass(slots=True, eq=False)
class Replica:
    """One replica's stay on a device. Times are monotonic seconds.

    Attributes:
        task: reads the manifest and finds room; done before anything else begins.
        room: resolved when there may be some; None while it does not wait for that.
        origin: where bytes are that are not on the disk, if there are any.
        load: its wait for bytes, from its reservation on.
        check: what its bytes pass before its worker is told of them; None where they are not verified, or no more.
        done: bytes that its worker was told of.
        ready: its worker serves it.
        dropping: its worker was told to drop it.
        leaving: the head waits for `Unloaded`.
        shared: bytes of extents of its device that others refer to, or did, by their numbers.
    """

    order: wire.StartLoad
    began: float
    priority: Priority
    task: asyncio.Task[None] | None = None
    room: asyncio.Future[None] | None = None
    origin: Origin | None = None
    load: Load | None = None
    check: Check | None = None
    done: int = 0
    reserved: float = 0.0
    landed: float = 0.0
    told: float = 0.0
    told_bytes: int = 0
    ready: bool = False
    dropping: bool = False
    leaving: bool = False
    shared: dict[int, int] = field(default_factory=dict)

    def place(self, load: Load, room: bool, sample: int, twins: list[tuple[int, int, int, int]]) -> wire.Place:
        """What its worker is told of it before its bytes come; the arguments are as there."""
        order, found, lent = self.order, load.manifest, load.lent
        return wire.Place(
            replica=order.replica,
            model=order.model,
            checkpoint=order.checkpoint,
            config=found.raw_config,
            dtype=order.dtype,
            kv_floor=order.kv_floor,
            files=[file.size for file in found.files],
            ring=load.ringed,
            room=room,
            lenders=list(lent.sizes),
            runs=[(*run,) for run in lent.runs],
            total=lent.total,
            online=self.priority == Priority.ONLINE,
            verify=order.verify,
            sample=sample,
            twins=twins,
        )

    def served(self, load: Load, now: float, shared: list[tuple[int, int, int]]) -> wire.ReplicaReady:
        """What the head is told of its way here, by phases; `shared` is as there."""
        return wire.ReplicaReady(
            replica=self.order.replica,
            queue_s=self.reserved - self.began + load.queue_s,
            disk_s=0.0 if load.came.remote else load.read_s,
            upload_s=now - self.landed,
            total_s=now - self.began,
            disk_bytes=load.came.disk,
            cache_bytes=load.came.cache,
            dram_bytes=load.dram_bytes,
            remote_s=load.read_s if load.came.remote else 0.0,
            remote_bytes=load.came.remote,
            shared=shared,
        )
