"""What the outside sees of the machine's state: the catalog of models, and the status of nodes and devices. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serverless_llm import wire
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import PLANNED, Device, Model, Node, Replica, Sequence, State
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.domain import CheckpointId, Footprint, ModelSpec, Tier
from serverless_llm.node.peers import Peer
from serverless_llm.placement.estimate import Links, Start, startup_s

POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Clocks:
    """The machine's time and the world's, of one moment, in seconds."""

    now: float
    unix: float

    def unix_of(self, machine_time: float) -> float:
        return self.unix + machine_time - self.now


@dataclass(frozen=True, slots=True)
class Entry:
    """What the head knows of a model beside the machine. `error`: why it could not even be deployed after a restart."""

    spec: ModelSpec
    created: int
    error: str = ""


def info(entry: Entry, model: Model | None, state: State, clocks: Clocks) -> wire.ModelInfo:
    """One model, as the surface shows it; `model`: None where it could not be deployed."""
    spec = entry.spec
    replicas = [] if model is None else [one for one in model.replicas.values() if one.state in PLANNED]
    footprint = None if model is None else model.footprint
    return wire.ModelInfo(
        name=spec.name,
        source=spec.source,
        checkpoint=footprint.checkpoint if footprint else "",
        dtype=spec.dtype,
        context=footprint.context if footprint else spec.context or 0,
        created=entry.created,
        state=_state(model, replicas, clocks.now),
        tier=_tier(footprint.checkpoint if footprint else "", replicas, state),
        progress=_progress(replicas),
        error=entry.error or (model.error if model else ""),
        devices=sorted(str(one.device) for one in replicas),
        bytes=footprint.file_bytes if footprint else 0,
        keep_alive=spec.keep_alive,
        pinned=spec.pinned,
        until=_until(spec, replicas, clocks),
        estimate_s=_estimate_s(footprint, state) if footprint else 0.0,
        waiting=model.demand if model else 0,
        running=sum(len(one.running) for one in replicas),
    )


def _state(model: Model | None, replicas: list[Replica], now: float) -> str:
    if model is None:
        return "failed"
    states = {one.state for one in replicas}
    if ReplicaState.READY in states:
        return "loaded"
    if states:
        return "loading"
    return "failed" if model.error and model.cool_until > now else "unloaded"


def _tier(checkpoint: CheckpointId, replicas: list[Replica], state: State) -> str:
    if any(one.state is ReplicaState.READY for one in replicas):
        return Tier.DEVICE
    return Tier.DRAM if any(checkpoint in node.resident for node in state.nodes.values()) else Tier.DISK


def _progress(replicas: list[Replica]) -> float:
    if any(one.state is ReplicaState.READY for one in replicas):
        return 1.0
    return max((one.progress_done / one.progress_total for one in replicas if one.progress_total), default=0.0)


def _until(spec: ModelSpec, replicas: list[Replica], clocks: Clocks) -> float | None:
    """When the last replica expires; None while one is in use, or is to stay."""
    ready = [one for one in replicas if one.state is ReplicaState.READY]
    if spec.pinned or not ready or any(one.running for one in ready):
        return None
    expiry = max(one.idle_since + one.keep_alive for one in ready)
    return None if math.isinf(expiry) else round(clocks.unix_of(expiry), 1)  # so that clock jitter is no change


def _estimate_s(footprint: Footprint, state: State) -> float:
    """Seconds until a replica would serve on the best device, started now, nothing in its way; 0: no device."""
    places = ((node, device) for node in state.nodes.values() for device in node.devices.values())
    return min((_startup_s(footprint, node, device) for node, device in places), default=0.0)


def _startup_s(footprint: Footprint, node: Node, device: Device) -> float:
    missing = footprint.file_bytes - node.resident.get(footprint.checkpoint, 0)
    links = Links(
        disk=node.bandwidth.get("disk", POLICY.disk_bps),
        upload=node.bandwidth.get("upload", POLICY.upload_bps),
        overhead_s=POLICY.overhead_s if node.overhead_s is None else node.overhead_s,
    )
    return startup_s(Start(queued=0, missing=missing, upload=0 if device.view else footprint.weight_bytes), links)


def nodes(state: State, peers: Mapping[str, Peer]) -> list[dict[str, Any]]:
    """Every connected node with its devices, replicas and sequences, as JSON."""
    return [_node(state.nodes[name], peers[name]) for name in sorted(state.nodes.keys() & peers.keys())]


def _node(node: Node, peer: Peer) -> dict[str, Any]:
    return {
        "node": peer.hello.node,
        "state": node.state.value,
        "agent_pid": peer.hello.pid,
        "dram": peer.hello.dram,
        "dram_used": peer.resident_bytes,
        "resident": [{"checkpoint": name, "bytes": size} for name, size in sorted(node.resident.items())],
        "bandwidth": node.bandwidth,
        "link_bytes": peer.link_bytes,
        "devices": [_device(device, peer) for device in node.devices.values()],
    }


def _device(device: Device, peer: Peer) -> dict[str, Any]:
    worker = peer.workers.get(device.id.number)
    used, free = peer.kv.get(device.id.number, (0, 0))
    return {
        "device": str(device.id),
        "kind": device.spec.kind,
        "weights": device.spec.weights,
        "budget": device.spec.budget,
        "granted": device.planned.used,
        "worker_pid": worker.pid if worker else None,
        "incarnation": worker.incarnation if worker else 0,
        "step": worker.step if worker else 0,
        "numerics_id": worker.numerics_id if worker else "",
        "kv_used": used,
        "kv_free": free,
        "replicas": [_replica(one) for one in device.replicas.values()],
        "sequences": [_sequence(one) for replica in device.replicas.values() for one in replica.running.values()],
    }


def _sequence(one: Sequence) -> dict[str, Any]:
    return {
        "sequence": one.id,
        "epoch": one.epoch,
        "model": one.model,
        "state": one.state.value,
        "tokens": one.generated,
    }


def _replica(replica: Replica) -> dict[str, Any]:
    return {
        "replica": replica.id,
        "model": replica.model,
        "state": replica.state.value,
        "bytes": replica.grant,
        "done": replica.progress_done,
        "total": replica.progress_total,
        "predicted_s": replica.predicted_s,
        "running": len(replica.running),
    }
