"""What the outside sees of the machine's state: the catalog of models, and the status of nodes and devices. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serverless_llm import wire
from serverless_llm.cluster import views
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import ACTUAL, Device, Model, Node, Replica, Sequence, State
from serverless_llm.domain import ModelSpec, Tier
from serverless_llm.node.peers import Peer


@dataclass(frozen=True, slots=True)
class Clocks:
    """The machine's time and the world's, of one moment, in seconds."""

    now: float
    unix: float

    def unix_of(self, machine_time: float) -> float:
        return self.unix + machine_time - self.now


@dataclass(frozen=True, slots=True)
class Entry:
    """What the head knows of a model beside the machine.

    Attributes:
        error: why it could not even be deployed after a restart.
        wanted: the body of the deploy that failed then; b"": that of `spec`.
    """

    spec: ModelSpec
    created: int
    error: str = ""
    wanted: bytes = b""


def info(entry: Entry, model: Model | None, state: State, policy: Policy, clocks: Clocks) -> wire.ModelInfo:
    """One model, as the surface shows it; `model`: None where it could not be deployed."""
    view = views.model(state, policy, model, clocks.now) if model else None
    footprint = model.footprint if model else None
    spec = entry.spec
    return wire.ModelInfo(
        name=spec.name,
        source=spec.source,
        checkpoint=footprint.checkpoint if footprint else "",
        dtype=spec.dtype,
        context=footprint.context if footprint else spec.context or 0,
        created=entry.created,
        state=view.state if view else "failed",
        tier=view.tier if view else Tier.DISK,
        progress=view.progress if view else 0.0,
        error=view.error if view else entry.error,
        devices=[str(device) for device in view.devices] if view else [],
        bytes=footprint.file_bytes if footprint else 0,
        keep_alive=spec.keep_alive,
        pinned=spec.pinned,
        until=round(clocks.unix_of(view.until), 1) if view and view.until else None,  # clocks' jitter is no change
        estimate_s=min(view.estimate_s, policy.retry_cap_s) if view and view.estimate_s is not None else None,
        waiting=view.waiting if view else 0,
        running=view.running if view else 0,
        min_replicas=spec.min_replicas,
        verify=spec.verify,
        remote_bytes=view.remote_bytes if view else 0,
        url=spec.url,
        max_replicas=spec.max_replicas,
        max_concurrency=spec.max_concurrency,
        max_queue=spec.max_queue,
    )


def problems(state: State) -> list[str]:
    """Why devices take nothing: they are not up, or drained; empty when all do."""
    if not state.devices:
        return ["no node has joined"]
    each = [(device.problem, device) for device in state.devices.values()]
    return [problem or _drained(device) for problem, device in each if problem or device.drained]


def _drained(device: Device) -> str:
    """With what undoes it: no verb of the command line does."""
    return f'{device.id} is drained (POST /admin/nodes/{device.id.node}/drain {{"drained": false}} takes it back)'


def nodes(state: State, peers: Mapping[str, Peer]) -> list[dict[str, Any]]:
    """Every connected node with its devices, replicas and sequences, as JSON."""
    return [_node(state.nodes[name], peers[name]) for name in sorted(state.nodes.keys() & peers.keys())]


def _node(node: Node, peer: Peer) -> dict[str, Any]:
    return {
        "node": peer.hello.node,
        "state": node.state.value,
        "drained": any(device.drained for device in node.devices.values()),
        "agent_pid": peer.hello.pid,
        "dram": peer.hello.dram,
        "dram_used": peer.resident_bytes,
        "resident": [{"checkpoint": name, "bytes": size} for name, size in sorted(node.resident.items())],
        "lent_bytes": node.lent,
        "bandwidth": node.bandwidth,
        "limits": peer.hello.limits,
        "overhead_s": node.overhead_s,
        "link_bytes": peer.link_bytes,
        "digests": peer.digests,
        "verified": peer.verified,
        "own_bytes": peer.own_bytes,
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
        "memory": memory(device, used),
        "worker_pid": worker.pid if worker else None,
        "incarnation": worker.incarnation if worker else 0,
        "step": worker.step if worker else 0,
        "failed_boots": device.failed_boots,
        "problem": device.problem,
        "trial": device.trial[0] if device.trial else "",
        "numerics_id": worker.numerics_id if worker else "",
        "pinned": {"bytes": worker.pinned if worker else 0, "refused": worker.unpinned if worker else ""},
        "kv_used": used,
        "kv_free": free,
        "replicas": [_replica(one, device) for one in device.replicas.values()],
        "sequences": [_sequence(one) for replica in device.replicas.values() for one in replica.running.values()],
    }


def memory(device: Device, kv_used: int) -> dict[str, int]:
    """What the budget is used for now, in bytes."""
    weights = device.actual.used - sum(one.kv_floor for one in device.replicas.values() if one.state in ACTUAL)
    return {"weights": weights, "kv": kv_used, "free": max(0, device.spec.budget - weights - kv_used)}


def _sequence(one: Sequence) -> dict[str, Any]:
    return {
        "sequence": one.id,
        "epoch": one.epoch,
        "model": one.model,
        "state": one.state.value,
        "tokens": one.generated,
    }


def _replica(replica: Replica, device: Device) -> dict[str, Any]:
    """`shared_bytes`: of `weight_bytes`, those that others on the device have, too, and that count once there."""
    return {
        "replica": replica.id,
        "model": replica.model,
        "state": replica.state.value,
        "bytes": replica.grant,
        "weight_bytes": replica.footprint.weight_bytes,
        "shared_bytes": sum(size for extent, size in replica.shared if device.actual.held[extent][0] > 1),
        "done": replica.progress_done,
        "total": replica.progress_total,
        "predicted_s": replica.predicted_s,
        "running": len(replica.running),
    }
