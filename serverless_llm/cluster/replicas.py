"""Replicas: room is claimed, the worker reserves it, the agent loads; later they leave. Ledgers follow each step."""

from __future__ import annotations

from collections import defaultdict

from serverless_llm.cluster.commands import (
    Evicted,
    Hasten,
    KillWorker,
    Outcome,
    Reserve,
    StartLoad,
    Unload,
)
from serverless_llm.cluster.events import LoadFailed, LoadProgress, Refused, ReplicaReady, Reserved, Unloaded
from serverless_llm.cluster.failures import fail, forgive
from serverless_llm.cluster.ledger import Charge, Ledger, extent
from serverless_llm.cluster.sequences import end_trial, recall, requeue
from serverless_llm.cluster.state import ACTUAL, PLANNED, STARTING, Device, Node, Replica
from serverless_llm.cluster.transitions import REPLICA, ReplicaState, move
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import DeviceId, LoadPhases, ReplicaId
from serverless_llm.placement.estimate import learn

# --- steps ---


def shift(turn: Turn, replica: Replica, cause: str) -> None:
    """Move a replica along its table, and the ledgers of its device and node with it."""
    before = replica.state
    move(REPLICA, replica, cause, turn.now)
    device = turn.device(replica.device)
    node = turn.state.nodes[device.id.node]
    if replica.state not in STARTING:
        end_trial(turn, device, ("load", replica.id))
    if before is ReplicaState.LOADING and replica.online:
        _go_on(turn, node)
    for states, ledger, dram in (
        (PLANNED, device.planned, node.planned_dram),
        (ACTUAL, device.actual, node.actual_dram),
    ):
        if before in states and replica.state not in states:
            _discharge(ledger, replica)
            if replica.promised[0] in ledger.held:
                ledger.remove(replica.promised[0])
            if device.view:
                dram.remove(replica.checkpoint)
            turn.room = True
        elif before not in states and replica.state in states:
            _charge(ledger, replica)
            if device.view:
                dram.add(replica.checkpoint, replica.footprint.file_bytes)


def enter(turn: Turn, replica: Replica) -> None:
    """A new replica, decided (CLAIMING) or adopted (READY), takes its place in the state."""
    device = turn.device(replica.device)
    node = turn.state.nodes[device.id.node]
    turn.state.replicas[replica.id] = replica
    turn.state.models[replica.model].replicas[replica.id] = replica
    device.replicas[replica.id] = replica
    ledgers = [(device.planned, node.planned_dram)]
    ledgers += [(device.actual, node.actual_dram)] if replica.state in ACTUAL else []
    for ledger, dram in ledgers:
        _charge(ledger, replica)
        if device.view:
            dram.add(replica.checkpoint, replica.footprint.file_bytes)
    turn.touch(replica.model)


def start(turn: Turn, replica: Replica) -> None:
    """Claim room for a new replica; what must leave for it was told to."""
    enter(turn, replica)
    claim(turn, turn.state.nodes[replica.device.node])


def claim(turn: Turn, node: Node) -> None:
    """Whoever claims room on this node and finds it free by now reserves it."""
    for device in node.devices.values():
        for replica in list(device.replicas.values()) if device.usable else ():
            if replica.state is ReplicaState.CLAIMING and _has_room(device, node, replica):
                shift(turn, replica, "room")
                turn.emit(Reserve(device.id, replica.id, replica.grant))
                turn.arm("replica", replica.id, turn.policy.reserve_s)


def hasten(turn: Turn, replica: Replica) -> None:
    """Somebody waits for a start that was made for nobody; its bytes may begin to flow only now."""
    replica.online = True
    if replica.state is ReplicaState.LOADING:
        turn.emit(Hasten(replica.id, replica.device))
        _go_before(turn, replica)
        _give_time(turn, replica)


def unload(turn: Turn, replica: Replica, reason: str) -> None:
    """Off its device. It runs nothing, or runs it no longer."""
    turn.emit(Evicted(replica.id, replica.model, replica.device, reason))
    if replica.state is ReplicaState.CLAIMING:
        leave(turn, replica, "cancel")
    else:
        _depart(turn, replica, "evict" if replica.state is ReplicaState.READY else "cancel")


def send_off(turn: Turn, replica: Replica, reason: str) -> None:
    """Unload what is idle or on its way; what runs something leaves when that has ended."""
    if replica.running:
        replica.retiring = reason
    else:
        unload(turn, replica, reason)


def leave(turn: Turn, replica: Replica, cause: str) -> None:
    """It holds nothing any more: its sequences are queued again, whoever claimed its room gets it."""
    for sequence in list(replica.running.values()):
        requeue(turn, sequence)
    device = turn.device(replica.device)
    shift(turn, replica, cause)
    for kind in ("replica", "idle", "abandon"):
        turn.disarm(kind, replica.id)
    del turn.state.replicas[replica.id], device.replicas[replica.id]
    for other in device.replicas.values():
        if other.promises:
            turn.touch(other.model)
    model = turn.state.models.get(replica.model)
    if model is not None:
        model.replicas.pop(replica.id, None)
        turn.touch(replica.model)
    claim(turn, turn.state.nodes[device.id.node])


# --- events ---


def reserved(turn: Turn, event: Reserved) -> None:
    replica = turn.state.replicas.get(event.replica)
    if replica is None or replica.state is not ReplicaState.RESERVING:
        return
    shift(turn, replica, "reserved")
    sated(turn, replica.device)
    _go_before(turn, replica)
    _give_time(turn, replica)
    turn.emit(
        StartLoad(
            replica.id,
            replica.device,
            replica.model,
            replica.source,
            replica.checkpoint,
            replica.dtype,
            replica.kv_floor,
            replica.online,
            replica.verify,
        )
    )


def refused(turn: Turn, event: Refused) -> None:
    """The device has less than was believed: it is left alone for a moment, and more must leave next time."""
    replica = turn.state.replicas.get(event.replica)
    if replica is None or replica.state is not ReplicaState.RESERVING:
        return
    device = turn.device(replica.device)
    device.avoid_until = turn.now + turn.policy.avoid_s
    device.shortfall += event.missing
    turn.arm("avoid", device.id, turn.policy.avoid_s)
    turn.arm("short", device.id, turn.policy.shortfall_s)
    leave(turn, replica, "refused")


def progressed(turn: Turn, event: LoadProgress) -> None:
    replica = turn.state.replicas.get(event.replica)
    if replica is None or replica.state is not ReplicaState.LOADING or event.done <= replica.progress_done:
        return
    replica.progress_done, replica.progress_total = event.done, event.total
    _give_time(turn, replica)


def ready(turn: Turn, event: ReplicaReady) -> None:
    replica = turn.state.replicas.get(event.replica)
    if replica is None:
        return  # the next heartbeat lists it, if it is there at all
    if replica.state is ReplicaState.UNLOADING:
        turn.emit(Unload(replica.id, replica.device))
    if replica.state is not ReplicaState.LOADING:
        return
    shift(turn, replica, "ready")
    _share(turn.device(replica.device), replica, event.shared)
    turn.disarm("replica", replica.id)
    replica.ready_at = replica.idle_since = turn.now
    replica.phases = event.phases
    actual_s = turn.now - replica.decided_at
    _learn(turn, replica, actual_s, event.phases)
    turn.emit(Outcome(replica.id, replica.model, replica.device, replica.predicted_s, actual_s, event.phases))
    forgive(turn, turn.state.models[replica.model])
    turn.room = True
    turn.touch(replica.model)


def load_failed(turn: Turn, event: LoadFailed) -> None:
    """What it left behind is unloaded; the model cools down."""
    replica = turn.state.replicas.get(event.replica)
    if replica is None or replica.state is not ReplicaState.LOADING:
        return
    _depart(turn, replica, "failed")
    fail(turn, turn.state.models[replica.model], event.message, event.permanent)


def unloaded(turn: Turn, event: Unloaded) -> None:
    replica = turn.state.replicas.get(event.replica)
    if replica is not None and replica.state is ReplicaState.UNLOADING:
        leave(turn, replica, "unloaded")


def _share(device: Device, replica: Replica, shared: tuple[tuple[int, int, ReplicaId], ...]) -> None:
    """Extents that others brought are theirs and its own from now on: the ledgers count them once."""
    extents: dict[ReplicaId, list[Charge]] = defaultdict(list)
    for number, size, lender in shared:
        for name in (lender, replica.id):
            extents[name].append(extent(number, size))
    for name, parts in extents.items():
        if name in device.replicas:
            _split(device, device.replicas[name], parts)


def _split(device: Device, replica: Replica, extents: list[Charge]) -> None:
    ledgers = [
        ledger for states, ledger in ((PLANNED, device.planned), (ACTUAL, device.actual)) if replica.state in states
    ]
    for ledger in ledgers:
        _discharge(ledger, replica)
    replica.shared = tuple(dict.fromkeys([*replica.shared, *extents]))
    for ledger in ledgers:
        _charge(ledger, replica)


def _charge(ledger: Ledger, replica: Replica) -> None:
    for charge in replica.charges:
        ledger.add(*charge)


def _discharge(ledger: Ledger, replica: Replica) -> None:
    for key, _ in replica.charges:
        ledger.remove(key)


# --- deadlines ---


def overdue(turn: Turn, replica_id: ReplicaId) -> None:
    """A command about this replica was not answered."""
    replica = turn.state.replicas[replica_id]
    if replica.state is ReplicaState.LOADING:
        _load_overdue(turn, replica)
    else:
        kill_worker(turn, turn.device(replica.device))


def sated(turn: Turn, device_id: DeviceId) -> None:
    """What a device refused some time ago says nothing about now."""
    turn.device(device_id).shortfall = 0
    claim(turn, turn.state.nodes[device_id.node])
    turn.room = True


def avoided(turn: Turn, _: DeviceId) -> None:
    turn.room = True


def kill_worker(turn: Turn, device: Device) -> None:
    """Nobody knows any more what its worker holds."""
    if device.usable:
        device.killing = True
        turn.emit(KillWorker(device.id, device.incarnation))
        turn.arm("kill", device.id, turn.policy.kill_s)


def vanish(turn: Turn, replica: Replica) -> None:
    """Its worker's reports leave it out: it is not there, and nothing runs on it."""
    for sequence in list(replica.running.values()):
        recall(turn, sequence)
    leave(turn, replica, "absent")


def _depart(turn: Turn, replica: Replica, cause: str) -> None:
    shift(turn, replica, cause)
    turn.disarm("abandon", replica.id)
    turn.emit(Unload(replica.id, replica.device))
    turn.arm("replica", replica.id, turn.policy.unload_s)
    turn.touch(replica.model)


def _go_before(turn: Turn, replica: Replica) -> None:
    """The time of other loads may stand still from now on, unless it does already."""
    others = [other for other in _loading(turn.state.nodes[replica.device.node]) if other is not replica]
    if not any(other.online for other in others):
        for other in others:
            due = turn.state.timers.at(("replica", other.id))
            assert due is not None
            other.left_s = due - turn.now


def _go_on(turn: Turn, node: Node) -> None:
    """A load that went before others has ended: they have what is left of their time, unless others go before them."""
    for other in _loading(node):
        if not other.online:
            turn.arm("replica", other.id, other.left_s)


def _give_time(turn: Turn, replica: Replica) -> None:
    """A load has all of its time from now on."""
    replica.left_s = _load_deadline(turn, replica)
    turn.arm("replica", replica.id, replica.left_s)


def _loading(node: Node) -> list[Replica]:
    residents = (replica for device in node.devices.values() for replica in device.replicas.values())
    return [replica for replica in residents if replica.state is ReplicaState.LOADING]


def _load_overdue(turn: Turn, replica: Replica) -> None:
    """One that others go before has not got stuck."""
    neighbours = _loading(turn.state.nodes[replica.device.node])
    if not replica.online and any(one.online for one in neighbours):
        turn.arm("replica", replica.id, _load_deadline(turn, replica))
        return
    _depart(turn, replica, "expired")
    model = turn.state.models[replica.model]
    model.expiries += 1
    if model.expiries >= turn.policy.load_expiries:
        fail(turn, model, f"loading got stuck {model.expiries} times, last on {replica.device}", permanent=False)


def _has_room(device: Device, node: Node, replica: Replica) -> bool:
    dram = device.view and node.actual_dram.missing((replica.checkpoint, replica.footprint.file_bytes)) > 0
    return replica.grant <= device.actual.free - device.shortfall and not dram


def _load_deadline(turn: Turn, replica: Replica) -> float:
    return max(turn.policy.load_floor_s, turn.policy.load_factor * replica.predicted_s)


def _learn(turn: Turn, replica: Replica, actual_s: float, phases: LoadPhases) -> None:
    """What a start takes beside moving bytes; how fast bytes move is the agent's to tell."""
    node = turn.state.nodes[replica.device.node]
    upload_s = 0.0 if turn.device(replica.device).view else phases.upload_s  # mapping moves none
    moving_s = phases.queue_s + phases.remote_s + phases.disk_s + upload_s
    node.overhead_s = learn(node.overhead_s, max(0.0, actual_s - moving_s), turn.policy.learn_weight)
