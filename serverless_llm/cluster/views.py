"""What the status surface shows, computed from the state and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.starts import predicted_s
from serverless_llm.cluster.state import STARTING, Device, Model, Node, Replica, State
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import DeviceId, ModelName, NodeId, ReplicaId, Tier


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model.

    Attributes:
        state: `unloaded`, `loading`, `loaded` or `failed`.
        tier: the nearest that holds all of its bytes.
        progress: of its load, 0 ... 1.
        until: when its replica's keep-alive ends; None while it is used, or without end.
        estimate_s: of its next cold start, on the best of the devices; inf where there is none.
        retry_after: seconds until it may be loaded again; None: at once; inf: never without a new deploy.
    """

    name: ModelName
    state: str
    tier: Tier
    progress: float
    error: str
    devices: tuple[DeviceId, ...]
    until: float | None
    estimate_s: float
    waiting: int
    running: int
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    replica: ReplicaId
    model: ModelName
    state: str
    bytes: int
    running: int


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device. `granted`: bytes that replicas may hold now; `trial`: what it is given over to, empty if nothing."""

    device: DeviceId
    kind: str
    weights: str
    up: bool
    budget: int
    granted: int
    replicas: tuple[ReplicaView, ...]
    trial: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. `pinned`: bytes of its DRAM that view mode holds; `resident`: all checkpoint bytes there."""

    node: NodeId
    state: str
    dram: int
    pinned: int
    resident: int
    heard_s: float
    bandwidth: tuple[tuple[str, float], ...]


def models(state: State, policy: Policy, now: float) -> list[ModelView]:
    return [model(state, policy, one, now) for one in state.models.values()]


def model(state: State, policy: Policy, one: Model, now: float) -> ModelView:
    present = one.present()
    ready = one.ready()
    starting = [replica for replica in present if replica.state in STARTING]
    cooling = now < one.cool_until
    return ModelView(
        one.spec.name,
        "loaded" if ready else "loading" if starting else "failed" if one.error else "unloaded",
        _tier(state, one, ready),
        max((_progress(replica) for replica in present), default=0.0),
        one.error,
        tuple(sorted(replica.device for replica in present)),
        _until(state, ready),
        _estimate_s(state, policy, one, now),
        one.demand,
        sum(len(replica.running) for replica in one.replicas.values()),
        one.cool_until - now if cooling else None,
    )


def devices(state: State) -> list[DeviceView]:
    return [_device(one) for one in state.devices.values()]


def nodes(state: State, now: float) -> list[NodeView]:
    return [_node(one, now) for one in state.nodes.values()]


def _device(one: Device) -> DeviceView:
    replicas = tuple(
        ReplicaView(replica.id, replica.model, replica.state.value, replica.grant, len(replica.running))
        for replica in one.replicas.values()
    )
    trial = "" if one.trial is None else f"{one.trial[0]} {one.trial[1]}"
    return DeviceView(
        one.id, one.spec.kind, one.spec.weights, one.usable, one.spec.budget, one.actual.used, replicas, trial
    )


def _node(one: Node, now: float) -> NodeView:
    resident = sum(one.resident.values())
    bandwidth = tuple(sorted(one.bandwidth.items()))
    return NodeView(
        one.spec.node, one.state.value, one.spec.dram, one.actual_dram.used, resident, now - one.heard, bandwidth
    )


def _tier(state: State, one: Model, ready: list[Replica]) -> Tier:
    footprint = one.footprint
    held = (node.resident.get(footprint.checkpoint, 0) for node in state.nodes.values())
    if ready:
        return Tier.DEVICE
    return Tier.DRAM if max(held, default=0) >= footprint.file_bytes else Tier.DISK


def _progress(replica: Replica) -> float:
    if replica.state is ReplicaState.READY:
        return 1.0
    return replica.progress_done / max(1, replica.progress_total)


def _until(state: State, ready: list[Replica]) -> float | None:
    """When the last of the replicas leaves, by the clock of the events."""
    ends = [state.timers.at(("idle", replica.id)) for replica in ready]
    known = [end for end in ends if end is not None]
    return max(known) if known and len(known) == len(ends) else None


def _estimate_s(state: State, policy: Policy, one: Model, now: float) -> float:
    turn = Turn(state, policy, now)
    usable = (device for device in state.devices.values() if device.usable)
    return min((predicted_s(turn, one.footprint, device)[0] for device in usable), default=math.inf)
