"""Between the wire and the machine: messages of agents and gateways as events, commands as messages. Pure."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from serverless_llm import wire
from serverless_llm.cluster import commands, events
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, LoadPhases, NodeId, NodeSpec, WorkClass


def joined(hello: wire.Hello) -> events.NodeJoined:
    node = hello.node
    shared: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for replica, extent, nbytes in hello.shared:
        shared[replica].append((extent, nbytes))
    return events.NodeJoined(
        node=NodeSpec(
            node=node,
            dram=hello.dram,
            devices=tuple(DeviceSpec(one.index, one.kind, one.budget, one.weights) for one in hello.devices),
            bandwidth=dict(hello.bandwidth),
        ),
        workers=tuple((DeviceId(node, one.device), one.incarnation) for one in hello.workers if one.incarnation),
        held=tuple(
            events.HeldReplica(replica, DeviceId(node, device), model, checkpoint, dtype, tuple(shared[replica]))
            for replica, device, model, checkpoint, dtype in hello.replicas
        ),
        resident=tuple(hello.resident),
    )


def from_node(node: NodeId, message: wire.Message) -> list[events.Event]:
    """The events in a message of an agent or of one of its workers; none where the machine need not know."""
    translate = _FROM_NODE.get(type(message))
    return list(translate(node, message)) if translate else []


def _heartbeat(node: NodeId, beat: wire.Heartbeat) -> Iterable[events.Event]:
    workers = tuple(
        (DeviceId(node, one.device), one.incarnation, tuple(one.replicas)) for one in beat.workers if one.incarnation
    )
    bandwidth, lent = tuple(sorted(beat.bandwidth.items())), tuple(sorted(beat.lent.items()))
    away = tuple(sorted(beat.away.items()))
    yield events.Heartbeat(node, workers, tuple(beat.resident), bandwidth, lent, away)


def _step(node: NodeId, step: wire.Step) -> Iterable[events.Event]:
    for sequence, epoch, prefill_s in step.first:
        yield events.FirstToken(sequence, epoch, prefill_s)
    for sequence, epoch, reason, tokens in step.done:
        yield events.SequenceDone(sequence, epoch, FinishReason(reason), tokens)
    for refusal in step.refused:
        yield events.SequenceRefused(*refusal)


def _progress(node: NodeId, one: wire.Progress) -> Iterable[events.Event]:
    yield events.Progress(DeviceId(node, one.device), one.incarnation, tuple(one.sequences))


def _reserved(node: NodeId, one: wire.Reserved) -> Iterable[events.Event]:
    yield events.Reserved(DeviceId(node, one.device), one.replica)


def _refused(node: NodeId, one: wire.Refused) -> Iterable[events.Event]:
    yield events.Refused(DeviceId(node, one.device), one.replica, one.missing)


def _loading(node: NodeId, one: wire.LoadProgress) -> Iterable[events.Event]:
    yield events.LoadProgress(one.replica, one.done, one.total)


def _ready(node: NodeId, one: wire.ReplicaReady) -> Iterable[events.Event]:
    phases = LoadPhases(
        queue_s=one.queue_s,
        disk_s=one.disk_s,
        upload_s=one.upload_s,
        total_s=one.total_s,
        disk_bytes=one.disk_bytes,
        cache_bytes=one.cache_bytes,
        dram_bytes=one.dram_bytes,
        remote_s=one.remote_s,
        remote_bytes=one.remote_bytes,
    )
    yield events.ReplicaReady(one.replica, phases, tuple(one.shared))


def _failed(node: NodeId, one: wire.LoadFailed) -> Iterable[events.Event]:
    yield events.LoadFailed(one.replica, one.message, one.permanent)


def _unloaded(node: NodeId, one: wire.Unloaded) -> Iterable[events.Event]:
    yield events.Unloaded(one.replica)


def _up(node: NodeId, one: wire.WorkerUp) -> Iterable[events.Event]:
    yield events.WorkerUp(DeviceId(node, one.device), one.incarnation)


def _lost(node: NodeId, one: wire.WorkerLost) -> Iterable[events.Event]:
    yield events.WorkerLost(DeviceId(node, one.device), one.incarnation, one.cause, one.charged)


_FROM_NODE: dict[type[wire.Message], Callable[[NodeId, Any], Iterable[events.Event]]] = {
    wire.Heartbeat: _heartbeat,
    wire.Step: _step,
    wire.Progress: _progress,
    wire.Reserved: _reserved,
    wire.Refused: _refused,
    wire.LoadProgress: _loading,
    wire.ReplicaReady: _ready,
    wire.LoadFailed: _failed,
    wire.Unloaded: _unloaded,
    wire.WorkerUp: _up,
    wire.WorkerLost: _lost,
}


def from_gateway(message: wire.Message) -> list[events.Event]:
    """The events in a gateway's message about requests."""
    match message:
        case wire.Arrive(sequence, model, checkpoint, work_class, keep_alive, _):
            return [events.RequestArrived(sequence, model, checkpoint, WorkClass(work_class), keep_alive)]
        case wire.Prompted(sequence, prompt_tokens, max_tokens):
            return [events.PromptReady(sequence, prompt_tokens, max_tokens)]
        case wire.Gone(sequences, _):
            return [events.ClientGone(sequence) for sequence in sequences]
        case _:
            return []


def to_node(command: commands.Command) -> tuple[NodeId, int, wire.Message] | None:
    """A command for a node: the node, the device whose worker it is for (-1: the agent), the message."""
    match command:
        case commands.Reserve(device, replica, nbytes):
            return device.node, device.number, wire.Reserve(device.number, replica, nbytes)
        case commands.StartLoad(replica, device, model, source, checkpoint, dtype, kv_floor, online, verify):
            order = wire.StartLoad(replica, device.number, model, source, checkpoint, dtype, kv_floor, online, verify)
            return device.node, -1, order
        case commands.Hasten(replica, device):
            return device.node, -1, wire.Hasten(replica)
        case commands.Unload(replica, device):
            return device.node, -1, wire.Unload(replica)
        case commands.Cancel(device, sequence, epoch):
            return device.node, device.number, wire.Cancel([(sequence, epoch)])
        case commands.KillWorker(device, incarnation):
            return device.node, -1, wire.KillWorker(device.number, incarnation)
        case commands.Forget(node, checkpoint):
            return node, -1, wire.Forget(checkpoint)
        case _:
            return None


def to_gateway(command: commands.Command, destination: int) -> wire.Message | None:
    """A command for a gateway; `destination`: address of the worker that a `Dispatch` is about."""
    match command:
        case commands.Dispatch(sequence, epoch, replica, device, queue_s, phases):
            return wire.Attach(
                sequence, epoch, replica, destination, str(device), 1000 * queue_s, cold(phases) if phases else {}
            )
        case commands.GivenBack(sequence):
            return wire.GivenBack(sequence)
        case commands.Reject(sequence, status, code, message, retry_after, retry):
            return wire.Rejected(sequence, status, code, message, retry_after, retry)
        case _:
            return None


def described(note: commands.Decided | commands.Outcome | commands.Evicted | commands.GivenBack) -> str:
    """A decision, or how it went, as one line for the log."""
    fields = dataclasses.asdict(note)
    fields |= fields.pop("phases", {})
    parts = [f"{name}={_short(value)}" for name, value in fields.items() if name != "device"]
    return " ".join([type(note).__name__.lower(), f"device={note.device}", *parts])


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace(" ", "-")


def cold(phases: LoadPhases) -> dict[str, float]:
    """The phases of a cold start in milliseconds, as the surface shows them."""
    return {
        "load_queue_ms": 1000 * phases.queue_s,
        "load_remote_ms": 1000 * phases.remote_s,
        "load_disk_ms": 1000 * phases.disk_s,
        "load_upload_ms": 1000 * phases.upload_s,
        "load_ms": 1000 * phases.total_s,
    }
