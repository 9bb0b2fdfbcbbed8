"""Nodes and their workers: they join, report, fall silent and vanish; what they report corrects what is believed."""

from __future__ import annotations

from serverless_llm.cluster.commands import Cancel, DropNode, Forget, Unload
from serverless_llm.cluster.events import (
    Drain,
    Heartbeat,
    HeldReplica,
    NodeJoined,
    NodeLost,
    Progress,
    WorkerLost,
    WorkerUp,
)
from serverless_llm.cluster.ledger import Ledger, extent
from serverless_llm.cluster.poison import charge
from serverless_llm.cluster.replicas import enter, leave, send_off, vanish
from serverless_llm.cluster.sequences import mentioned, recall
from serverless_llm.cluster.starts import impossible
from serverless_llm.cluster.state import PLANNED, Device, Model, Node, Replica, Sequence
from serverless_llm.cluster.transitions import NODE, NodeState, ReplicaState, SequenceState, move
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import CheckpointId, DeviceId, NodeId, ReplicaId
from serverless_llm.placement import fit

# --- events ---


def joined(turn: Turn, event: NodeJoined) -> None:
    """A new node, or one whose link came back: what it holds and a deployed model names is adopted."""
    if event.node.node in turn.state.nodes:
        _forget(turn, turn.state.nodes[event.node.node])
    node = Node(
        event.node,
        NodeState.UP,
        turn.history(),
        turn.now,
        Ledger(event.node.dram),
        Ledger(event.node.dram),
        turn.policy.overhead_s,
        resident=dict(event.resident),
        bandwidth=dict(event.node.bandwidth),
    )
    turn.state.nodes[event.node.node] = node
    for spec in event.node.devices:
        device = Device(DeviceId(event.node.node, spec.number), spec, Ledger(spec.budget), Ledger(spec.budget))
        device.drained = event.node.node in turn.state.drained
        node.devices[spec.number] = turn.state.devices[device.id] = device
    _measure(turn)
    for device_id, incarnation in event.workers:
        turn.device(device_id).incarnation = incarnation
    turn.state.next_replica = max([turn.state.next_replica, *(held.replica + 1 for held in event.held)])
    for held in event.held:
        _adopt(turn, held, turn.state.models.get(held.model))
    turn.arm("silent", node.spec.node, turn.policy.silent_after)
    for name, model in turn.state.models.items():
        turn.touch(name)
        if not model.cool_until:  # else its error is that of a load
            model.error = impossible(turn, model)


def node_lost(turn: Turn, event: NodeLost) -> None:
    if event.node in turn.state.nodes:
        _forget(turn, turn.state.nodes[event.node])


def drain(turn: Turn, event: Drain) -> None:
    (turn.state.drained.add if event.drained else turn.state.drained.discard)(event.node)
    turn.room = True
    node = turn.state.nodes.get(event.node)
    for device in node.devices.values() if node else ():
        device.drained = event.drained
        for replica in list(device.replicas.values()) if event.drained else ():
            if replica.state in PLANNED:
                send_off(turn, replica, "drain")
                turn.touch(replica.model)


def worker_up(turn: Turn, event: WorkerUp) -> None:
    device = turn.state.devices.get(event.device)
    if device is not None and _up(turn, device) and event.incarnation > max(device.incarnation, device.lost):
        _renew(turn, device, event.incarnation)


def worker_lost(turn: Turn, event: WorkerLost) -> None:
    """Of one that was up, or of one that never came up: who waits for it may be told."""
    device = turn.state.devices.get(event.device)
    if device is None:
        return
    if device.incarnation:
        if event.incarnation >= device.incarnation:
            _bury(turn, device, event.cause, event.charged)
    elif event.incarnation > device.lost:
        device.failed_boots, device.cause = device.failed_boots + 1, event.cause
        turn.room = True
    device.lost = max(device.lost, event.incarnation)


def heartbeat(turn: Turn, event: Heartbeat) -> None:
    node = turn.state.nodes.get(event.node)
    if node is None or node.state is not NodeState.UP:
        return
    node.heard = turn.now
    node.resident, node.lent, node.away = dict(event.resident), dict(event.lent), dict(event.away)
    node.bandwidth.update(event.bandwidth)
    reported = {device: (incarnation, replicas) for device, incarnation, replicas in event.workers}
    for device in node.devices.values():
        incarnation, replicas = reported.get(device.id, (0, ()))
        _reconcile(turn, device, incarnation, replicas)
    _tidy(turn, node)


def progress(turn: Turn, event: Progress) -> None:
    """Who is left out for long is not there; who should not be there is cancelled."""
    device = turn.state.devices.get(event.device)
    if device is None or device.incarnation != event.incarnation or not device.usable:
        return
    if device.recalled:
        device.recalled &= {sequence_id for sequence_id, *_ in event.sequences}
        turn.room = True
    there = {}
    for sequence_id, epoch, tokens, _ in event.sequences:
        sequence = turn.state.sequences.get(sequence_id)
        if sequence is None or sequence.epoch > epoch:
            turn.emit(Cancel(device.id, sequence_id, epoch))
        elif sequence.replica is not None:
            there[sequence_id] = tokens
    for replica in list(device.replicas.values()):
        for sequence in list(replica.running.values()):
            if sequence.id in there:
                mentioned(turn, sequence, there[sequence.id])
            elif _overdue(turn, sequence, _patience(turn, sequence)):
                recall(turn, sequence)


# --- deadlines ---


def silent(turn: Turn, name: NodeId) -> None:
    """Heartbeats do not re-arm the deadline: it looks when the last one came."""
    node = turn.state.nodes[name]
    left = node.heard + turn.policy.silent_after - turn.now
    if left > 0:
        turn.arm("silent", name, left)
    else:
        drop(turn, node)


def kill_overdue(turn: Turn, device: DeviceId) -> None:
    """An agent that cannot kill its worker is no agent."""
    drop(turn, turn.state.nodes[device.node])


def drop_overdue(turn: Turn, name: NodeId) -> None:
    _forget(turn, turn.state.nodes[name])


def drop(turn: Turn, node: Node) -> None:
    """Nothing there counts any more; the node may come back with a new link."""
    move(NODE, node, "silent", turn.now)
    turn.emit(DropNode(node.spec.node))
    _vacate(turn, node)
    turn.disarm("silent", node.spec.node)
    turn.arm("drop", node.spec.node, turn.policy.drop_s)


# --- losses ---


def _forget(turn: Turn, node: Node) -> None:
    _vacate(turn, node)
    move(NODE, node, "lost", turn.now)
    for kind in ("silent", "drop"):
        turn.disarm(kind, node.spec.node)
    for device in node.devices.values():
        del turn.state.devices[device.id]
    del turn.state.nodes[node.spec.node]
    _measure(turn)


def _measure(turn: Turn) -> None:
    turn.state.largest = max((device.spec.budget for device in turn.state.devices.values()), default=0)


def _vacate(turn: Turn, node: Node) -> None:
    """A node's loss charges nobody: it says nothing of what ran there."""
    for device in node.devices.values():
        _mark_down(device)
    for device in node.devices.values():
        _empty(turn, device)


def _bury(turn: Turn, device: Device, cause: str, charged: bool = True) -> None:
    """`charged`: it died by itself, unless it was told to."""
    charged = charged and not device.killing
    _mark_down(device)
    device.cause = cause
    if charged:
        charge(turn, device, cause)
    _empty(turn, device)


def _mark_down(device: Device) -> None:
    """First of all: no room that is freed on its way out is given to anyone."""
    device.lost, device.incarnation, device.killing = max(device.lost, device.incarnation), 0, False


def _empty(turn: Turn, device: Device) -> None:
    device.trial, device.shortfall, device.absent_since = None, 0, None
    device.court_at = device.avoid_until = 0.0
    device.recalled.clear()
    for replica in list(device.replicas.values()):
        leave(turn, replica, "lost")
    for kind in ("kill", "trial", "avoid", "short"):
        turn.disarm(kind, device.id)


def _renew(turn: Turn, device: Device, incarnation: int) -> None:
    """A new worker; the notice of the old one's death is late, or lost."""
    if device.incarnation:
        _bury(turn, device, f"replaced by worker {incarnation}")
    device.incarnation, device.absent_since, device.failed_boots = incarnation, None, 0
    turn.room = True


# --- reports ---


def _up(turn: Turn, device: Device) -> bool:
    return turn.state.nodes[device.id.node].state is NodeState.UP


def _reconcile(turn: Turn, device: Device, incarnation: int, replicas: tuple[ReplicaId, ...]) -> None:
    """One worker as its agent sees it, against what is believed of it."""
    if incarnation > max(device.incarnation, device.lost):
        _renew(turn, device, incarnation)
    if device.incarnation and incarnation != device.incarnation:
        if _overdue(turn, device, turn.policy.absent_s):
            _bury(turn, device, "its agent does not know it")
        return
    device.absent_since = None
    if incarnation:
        _correct(turn, device, set(replicas))
        for stray in sorted(set(replicas) - device.replicas.keys()):
            turn.emit(Unload(stray, device.id))


def _correct(turn: Turn, device: Device, there: set[ReplicaId]) -> None:
    for replica in list(device.replicas.values()):
        leaving = replica.state is ReplicaState.UNLOADING
        if not leaving and replica.state is not ReplicaState.READY:
            continue
        if replica.id in there:
            replica.absent_since = None
            if leaving and replica.history[-1][0] + turn.policy.absent_s <= turn.now:
                turn.emit(Unload(replica.id, device.id))
        elif _overdue(turn, replica, turn.policy.absent_s):
            vanish(turn, replica)


def _overdue(turn: Turn, thing: Device | Replica | Sequence, limit: float) -> bool:
    """Left out of a report; for the first time, or for long enough that it is not there?"""
    if thing.absent_since is None:
        thing.absent_since = turn.now
    return turn.now - thing.absent_since >= limit


def _patience(turn: Turn, sequence: Sequence) -> float:
    """A worker that never had it may still get it."""
    known = sequence.state is SequenceState.RUNNING
    return turn.policy.absent_s if known else turn.policy.dispatch_s


def _tidy(turn: Turn, node: Node) -> None:
    """Checkpoints in DRAM that no model and no replica names any more leave it."""
    named: set[CheckpointId] = {model.footprint.checkpoint for model in turn.state.models.values()}
    named |= {replica.checkpoint for device in node.devices.values() for replica in device.replicas.values()}
    for checkpoint in node.resident:
        if checkpoint not in named:
            turn.emit(Forget(node.spec.node, checkpoint))


def _adopt(turn: Turn, held: HeldReplica, model: Model | None) -> None:
    """A replica that outlived its head serves on, if a model still wants just that and the ledgers have room."""
    replica_id, device_id, device = held.replica, held.device, turn.device(held.device)
    served = held.checkpoint, held.dtype
    wanted = model is not None and (model.footprint.checkpoint, model.spec.dtype) == served
    if model is None or not wanted or not device.open or replica_id in turn.state.replicas:
        turn.emit(Unload(replica_id, device_id))
        return
    floor = fit.kv_floor(model.footprint, device.spec.budget, turn.policy.kv_floor_tokens, turn.policy.kv_floor_share)
    replica = Replica(
        replica_id,
        model.spec.name,
        model.revision,
        device_id,
        model.footprint.checkpoint,
        model.footprint,
        model.spec.dtype,
        model.spec.source,
        floor,
        ReplicaState.READY,
        turn.now,
        turn.history(),
        model.spec.keep_alive,
        ready_at=turn.now,
        idle_since=turn.now,
        shared=tuple(extent(*one) for one in held.shared),
    )
    node = turn.state.nodes[device_id.node]
    no_dram = device.view and node.planned_dram.missing((replica.checkpoint, model.footprint.file_bytes)) > 0
    present = model.present()
    unwanted = len(present) >= model.spec.max_replicas or any(other.device == device_id for other in present)
    if unwanted or device.planned.missing(*replica.charges) > 0 or no_dram:
        turn.emit(Unload(replica_id, device_id))
    else:
        enter(turn, replica)
