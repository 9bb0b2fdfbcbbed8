"""Replicas on their way to a worker's device, and those that hold the pool: the worker's side of a load.

Bytes are mapped (view mode, and where a dtype must be converted) or copied (copy mode) by the uploader's thread,
which wakes the worker's loop through `wakeup` when a replica is complete.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import time
from dataclasses import dataclass, field

import torch

from serverless_llm import wire
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.extents import Twins
from serverless_llm.errors import CapacityError, CheckpointError, InvariantError
from serverless_llm.loader import digest
from serverless_llm.loader.converted import Conversion
from serverless_llm.loader.link import Priority
from serverless_llm.loader.memory import Range
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import Lent, Run
from serverless_llm.loader.tasks import Mapping, Progress, Upload
from serverless_llm.loader.upload import Uploader
from serverless_llm.loader.ways import ByCpu, ByCuda, Way


@dataclass(slots=True, eq=False)
class Placement:
    """One replica. `spans`: what has landed before it was known how the bytes go.

    Attributes:
        reserved: the engine has made room for it.
        conversion: of what cannot be viewed as its files have it; None before all of `task` is there.
        copies: what of that the engine has no place for, as it lies misaligned in its file.
        names: of its tensors, in the order of its files, once it is `reserved`.
        arrived: its own bytes are on the device.
        last: monotonic seconds when its last bytes had landed, 0 before.
        active: it serves.
        closed: the uploader has nothing to do with it any more.
    """

    order: wire.Place
    model: ModelConfig
    task: Mapping | Upload
    spans: list[Landed] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    reserved: bool = False
    conversion: Conversion | None = None
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    arrived: bool = False
    last: float = 0.0
    active: bool = False
    closed: bool = False


class Placing:
    """All placements of one engine. Verbs answer with a message to the agent where there is one to give.

    Attributes:
        wakeup: descriptor that is readable when `finished` has news.
    """

    def __init__(self, engine: Engine, boot: wire.Boot, pool: int) -> None:
        self._engine = engine
        self._view = boot.weights == "view"
        self._pinned: queue.SimpleQueue[wire.Pinned] = queue.SimpleQueue()
        self._placements: dict[int, Placement] = {}
        self._complete: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # replica, bytes; of rings
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

        def way(window: Range) -> Way:
            return ByCuda(window, engine.device) if engine.device.type == "cuda" else ByCpu(window)

        def pinned(nbytes: int, refused: str) -> None:
            self._pinned.put(wire.Pinned(nbytes, refused))
            os.eventfd_write(self.wakeup, 1)

        self._uploader = Uploader(pool, boot.pool_bytes, boot.upload_rate, way, pinned)

    def close(self) -> None:
        """Ends the uploader's thread. What is placed stays mapped until the process ends."""
        self._uploader.close()
        os.close(self.wakeup)

    @property
    def busy(self) -> bool:
        return any(not one.active for one in self._placements.values())

    def model(self, replica: int) -> str:
        """Of which model a replica that is here is one."""
        return self._placements[replica].order.model

    def yield_to_steps(self, due: bool) -> None:
        """Whether steps run, beside which loads take less of the machine."""
        self._uploader.step_due = due

    def punched(self, offset: int) -> None:
        """The slot at this offset of the pool lost its memory."""
        self._uploader.punched(offset)

    def place(self, order: wire.Place) -> wire.Message | None:
        """Begins a placement; its pieces follow."""
        try:
            model = ModelConfig.parse(json.loads(order.config), order.dtype)
        except CheckpointError as error:
            return wire.Failed(order.replica, str(error), permanent=True)
        priority = Priority.ONLINE if order.online else Priority.PREFETCH
        placement = Placement(order, model, self._task(order, self._view, priority))
        self._placements[order.replica] = placement
        return None

    def hasten(self, replica: int) -> None:
        """Somebody waits for this replica by now; it may have failed."""
        placement = self._placements.get(replica)
        if placement is not None:
            placement.task.priority = Priority.ONLINE
            if placement.conversion is not None:
                placement.conversion.priority = Priority.ONLINE

    def landed(self, replica: int, pieces: list[tuple[int, int, int, int]], last: bool) -> wire.Message | None:
        """Bytes of a replica are in the pool."""
        placement = self._placements.get(replica)
        if placement is None:
            return None  # it failed, or was dropped, while they were on their way
        spans = [Landed(*piece) for piece in pieces]
        if last:
            placement.last = time.monotonic()
        try:
            placement.task.add(spans)
            if not placement.reserved:
                placement.spans += spans
                self._reserve(placement)
        except (CheckpointError, CapacityError) as error:
            return self._failed(placement, error)
        if last and placement.arrived:  # what came last is shared with another replica
            self._tell_complete(replica)
        return None

    def _tell_complete(self, replica: int) -> None:
        self._complete.put(replica)
        os.eventfd_write(self.wakeup, 1)

    def finished(self) -> list[wire.Message]:
        """Tells what rings may use again and what is pinned; activates the replicas whose bytes have arrived since."""
        os.eventfd_read(self.wakeup)
        read: dict[int, int] = {}
        while not self._read.empty():
            read.update([self._read.get()])
        answers: list[wire.Message] = [wire.Copied(replica, nbytes) for replica, nbytes in read.items()]
        while not self._pinned.empty():
            answers.append(self._pinned.get())
        while not self._complete.empty():
            placement = self._placements.get(self._complete.get())
            if placement is not None and not placement.active:
                placement.arrived = True
                answers += self._completed(placement) if placement.last else []
        return answers

    def drop(self, replica: int) -> list[int]:
        """The replica's sequences, which end without a word.

        When it returns nothing reads the replica's bytes in the pool. The uploader may keep them mapped.

        Raises:
            InvariantError: something does.
        """
        placement = self._placements.pop(replica, None)
        if placement is None:
            return []
        ended = self._engine.drop(replica) if placement.reserved else []
        self._close(placement)
        return [state.sequence for state in ended]

    def _task(self, order: wire.Place, view: bool, priority: Priority) -> Mapping | Upload:
        lent = Lent(order.lenders, [Run(*run) for run in order.runs], order.total)

        def read(nbytes: int) -> None:
            self._read.put((order.replica, nbytes))
            os.eventfd_write(self.wakeup, 1)

        task = (
            self._uploader.mapping(order.checkpoint, order.files, self._progress(order), lent)
            if view
            else self._uploader.upload(
                order.files, self._progress(order), read if order.ring else None, _due(order), lent
            )
        )
        task.priority = priority
        return task

    def _progress(self, order: wire.Place) -> Progress:
        def progress(done: int, total: int) -> None:
            if done == total:
                self._tell_complete(order.replica)

        return progress

    def _reserve(self, placement: Placement) -> None:
        """Makes room in the engine as soon as the headers are there."""
        headers = placement.task.headers()
        if headers is None:
            return
        entries = {one.name: (one.dtype, one.shape) for header in headers for one in header.tensors}
        order = placement.order
        placement.names = [one.name for header in headers for one in header.tensors]
        twins = self._twins(order.twins, placement.names)
        dests = self._engine.place(order.replica, placement.model, entries, order.kv_floor, twins)
        placement.reserved = True
        if isinstance(placement.task, Upload):
            if dests is not None:
                placement.task.start(dests, self._engine.arena)
                placement.arrived = not dests
            elif order.ring:
                raise (CapacityError if order.room else CheckpointError)(  # or no later load would do
                    f"{order.model} is stored in another type than {order.dtype}, so that all of its files must be in"
                    " DRAM at once, which has no room for them; serve has --dram"
                )
            else:
                placement.task.close()
                placement.task = self._task(order, True, placement.task.priority)
                placement.task.add(placement.spans)
        placement.spans = []

    def _twins(self, twins: list[tuple[int, int, int, int]], names: list[str]) -> Twins:
        """As of `wire.Place`, by name, of replicas that are still there."""
        found: dict[int, dict[str, str]] = {}
        for lender, mine, theirs, count in twins:
            other = self._placements.get(lender)
            if other is not None and other.active:
                pairs = zip(names[mine : mine + count], other.names[theirs : theirs + count], strict=True)
                found.setdefault(lender, {}).update(pairs)
        return found

    def _completed(self, placement: Placement) -> list[wire.Message]:
        """Activates a replica whose bytes have arrived, unless they are not what was sent: the agent drops it then."""
        order, task = placement.order, placement.conversion or placement.task
        if isinstance(task, Mapping):
            placement.copies = task.misaligned(self._engine.held(order.replica))
            if targets := self._engine.targets(order.replica) | placement.copies:
                placement.conversion = self._uploader.conversion(task, targets, self._progress(order), _due(order))
                placement.conversion.priority = task.priority
                return []
        elif isinstance(task, Conversion):
            task.close()
        if task.held is None:
            return [self._activate(placement)]
        differing = [part[:3] for part in task.held.differing]
        compared = wire.Compared(order.replica, task.held.nbytes, len(task.held.mended), differing)
        return [compared] if differing else [compared, self._activate(placement)]

    def _activate(self, placement: Placement) -> wire.Message:
        replica, task = placement.order.replica, placement.task
        try:
            if isinstance(task, Mapping):
                copies, placement.copies = placement.copies, {}
                there = self._engine.held(replica) | copies
                leased = self._engine.activate(replica, task.tensors(but=there) | copies)  # views in no variable
            else:
                leased = self._engine.activate(replica)
        except (CheckpointError, CapacityError) as error:
            refused = type(error)(str(error))  # the frames of that one refer to the tensors
        else:
            placement.active = True
            if not leased:
                self._close(placement)
            return wire.Placed(replica, time.monotonic() - placement.last, leased, self._engine.shared(replica))
        return self._failed(placement, refused)

    def _failed(self, placement: Placement, error: CheckpointError | CapacityError) -> wire.Message:
        self.drop(placement.order.replica)
        return wire.Failed(placement.order.replica, str(error), isinstance(error, CheckpointError))

    def _close(self, placement: Placement) -> None:
        if placement.closed:
            return
        if placement.conversion is not None:
            placement.conversion.close()
        if isinstance(placement.task, Upload):
            placement.task.close()
        elif not placement.task.close():
            gc.collect()  # a cycle may hold a view
            if not placement.task.close():
                raise InvariantError(f"replica {placement.order.replica} still refers to the pool: {placement.order}")
        placement.closed = True


def _due(order: wire.Place) -> digest.Due | None:
    """Which blocks are compared on the device; None: none."""
    if order.verify == "off":
        return None
    return digest.every if order.verify == "full" else digest.sampled(order.checkpoint, order.files, order.sample)
