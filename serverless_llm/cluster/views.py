"""What the status surface shows, computed from the state and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serverless_llm.cluster.estimates import predicted_s
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import STARTING, Model, Replica, State
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import DeviceId, Tier


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model.

    Attributes:
        state: `unloaded`, `loading`, `loaded` or `failed`.
        tier: the nearest that holds all of its bytes.
        remote_bytes: those that only a server has, on the node that has the most.
        progress: of its load, 0 ... 1.
        until: when its replica's keep-alive ends; None while it is used, or without end.
        estimate_s: of a start on the best of the devices, for those who wait; inf where there is none, None where
            nobody waits: the catalog of many idle models must cost next to nothing.
    """

    state: str
    tier: Tier
    remote_bytes: int
    progress: float
    error: str
    devices: tuple[DeviceId, ...]
    until: float | None
    estimate_s: float | None
    waiting: int
    running: int


def model(state: State, policy: Policy, one: Model, now: float) -> ModelView:
    present = one.present()
    ready = one.ready()
    starting = [replica for replica in present if replica.state in STARTING]
    remote = min((node.remote(one.footprint) for node in state.nodes.values()), default=one.footprint.remote_bytes)
    return ModelView(
        "loaded" if ready else "loading" if starting else "failed" if one.error else "unloaded",
        _tier(state, one, ready, remote),
        remote,
        max((_progress(replica) for replica in present), default=0.0),
        one.error,
        tuple(sorted(replica.device for replica in present)),
        _until(state, ready),
        _estimate_s(state, policy, one, now) if one.demand else None,
        one.demand,
        sum(len(replica.running) for replica in one.replicas.values()),
    )


def _tier(state: State, one: Model, ready: list[Replica], remote: int) -> Tier:
    footprint = one.footprint
    held = (node.resident.get(footprint.checkpoint, 0) for node in state.nodes.values())
    if ready:
        return Tier.DEVICE
    if max(held, default=0) >= footprint.file_bytes:
        return Tier.DRAM
    return Tier.REMOTE if remote else Tier.DISK


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
    usable = (device for device in state.devices.values() if device.open)
    return min((predicted_s(turn, one, device) for device in usable), default=math.inf)
