"""Who may leave a device for others, and when."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from serverless_llm.cluster.estimates import bring_back_s
from serverless_llm.cluster.ledger import Charge
from serverless_llm.cluster.replicas import unload
from serverless_llm.cluster.standing import abandoned, protected
from serverless_llm.cluster.state import PLANNED, Device, Model, Node, Replica, Sequence
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import CheckpointId, Footprint, ReplicaId
from serverless_llm.placement import evict, scale
from serverless_llm.placement.estimate import reuse


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that wants a replica; `since`: when the first of those who wait for it came; `sequence`: whose KV is to
    fit there."""

    model: Model
    want: scale.Want
    since: float
    sequence: Sequence | None = None


def hold_s(turn: Turn, replica: Replica) -> float:
    """Seconds of idleness before others may have its memory."""
    return evict.hold_s(bring_back_s(turn, replica), turn.policy.hold_floor_s, turn.policy.hold_cap_s)


def patience_s(turn: Turn, model: Model, replica: Replica) -> float:
    """Seconds that a model in steady use keeps its place while others wait."""
    while model.switches and model.switches[0] < turn.now - turn.policy.switch_window_s:
        model.switches.popleft()
    return evict.patience_s(
        bring_back_s(turn, replica), turn.policy.patience_s, turn.policy.patience_cap_s, len(model.switches)
    )


def residents(device: Device) -> list[Replica]:
    return [replica for replica in device.replicas.values() if replica.state in PLANNED]


def device_victims(
    turn: Turn, device: Device, leaves: Callable[[Replica], bool], short: int
) -> tuple[evict.Candidate, ...] | None:
    """Who must leave so that so many bytes are free. What replicas share is free when all of them have left."""
    if short <= 0:
        return ()
    leaving = [replica for replica in residents(device) if leaves(replica)]
    alone = evict.victims(_candidates(turn, device, [(replica,) for replica in leaving]), short)
    return alone or evict.victims(_candidates(turn, device, _sharers(leaving)), short)


def _candidates(turn: Turn, device: Device, groups: list[tuple[Replica, ...]]) -> list[evict.Candidate]:
    return [
        _candidate(turn, group, device.planned.freed(charge for replica in group for charge in _freed(replica)))
        for group in groups
    ]


def _freed(replica: Replica) -> list[Charge]:
    return [*replica.charges, replica.promised] if replica.promises else replica.charges


def _sharers(replicas: list[Replica]) -> list[tuple[Replica, ...]]:
    """Those that share extents, directly or through others, together."""
    holders: dict[Hashable, list[Replica]] = defaultdict(list)
    for replica in replicas:
        for key, _ in replica.shared:
            holders[key].append(replica)
    left = {replica.id: replica for replica in replicas}
    groups = []
    while left:
        group = [left.pop(next(iter(left)))]
        for one in group:  # it grows meanwhile
            for key, _ in one.shared:
                group += [other for other in holders.pop(key, ()) if left.pop(other.id, None)]
        groups.append(tuple(group))
    return groups


def dram_victims(
    turn: Turn,
    footprint: Footprint,
    node: Node,
    leaves: Callable[[Replica], bool],
    chosen: tuple[evict.Candidate, ...],
) -> tuple[evict.Candidate, ...] | None:
    """Who must leave besides `chosen` so that DRAM holds the files: all pins of a checkpoint, or none."""
    short = node.planned_dram.missing((footprint.checkpoint, footprint.file_bytes))
    if short <= 0:
        return ()
    gone = {replica for candidate in chosen for replica in candidate.replicas}
    pins: dict[CheckpointId, list[Replica]] = {}
    for device in node.devices.values():
        for replica in residents(device) if device.view else ():
            pins.setdefault(replica.checkpoint, []).append(replica)
    groups = []
    for replicas in pins.values():
        size = replicas[0].footprint.file_bytes
        left = tuple(replica for replica in replicas if replica.id not in gone)
        if not left:
            short -= size
        elif all(leaves(replica) for replica in left):
            groups.append(_candidate(turn, left, size))
    return evict.victims(groups, short)


def leaves_at(turn: Turn, claim: Claim, victim: Replica) -> float:
    """When `victim` may be told to leave for `claim`, or, if it runs something, to take nothing new; inf: never."""
    model = turn.state.models.get(victim.model)
    if model is None or model is claim.model or victim.retiring or protected(model, victim):
        return math.inf
    if victim.state is not ReplicaState.READY:
        return turn.now if abandoned(model, victim) else math.inf
    if victim.draining_for not in ("", claim.model.spec.name):
        return math.inf
    forced = math.inf
    if claim.want is scale.Want.FIRST:
        forced = max(claim.since, victim.ready_at) + patience_s(turn, model, victim)
    if victim.running or victim.promises or _serves_before(model, claim):
        return forced
    return min(forced, victim.idle_since + hold_s(turn, victim))


def leaves(turn: Turn, claim: Claim, in_use: bool, by: float) -> Callable[[Replica], bool]:
    """Whether a replica may be told to `by` then. `in_use`: reckon with the room of those that still run something."""
    return lambda replica: (in_use or not replica.running) and leaves_at(turn, claim, replica) <= by


def eviction_s(turn: Turn, victims: Iterable[evict.Candidate]) -> float:
    """Seconds that bringing them back is expected to take."""
    return sum(one.bring_back_s * reuse(one.idle_s, turn.policy.reuse_half_s) for one in victims)


def _serves_before(model: Model, claim: Claim) -> bool:
    """Whether somebody waits whom it can serve, or who came before: two that lack each other's room go by age."""
    eldest = model.eldest()
    return eldest is not None and (model.demand > len(model.cramped) or eldest < claim.since)


def _candidate(turn: Turn, replicas: tuple[Replica, ...], size: int) -> evict.Candidate:
    """Whoever is drained already goes first: the choice must not wander."""
    back = sum(0.0 if replica.draining_for else bring_back_s(turn, replica) for replica in replicas)
    idle = min(0.0 if replica.running else turn.now - replica.idle_since for replica in replicas)
    return evict.Candidate(tuple(replica.id for replica in replicas), size, back, idle)


def send_away(turn: Turn, victims: list[Replica]) -> None:
    """They leave for others. Whose model is taken before its time was over keeps its place for longer next time."""
    for victim in victims:
        ready = victim.state is ReplicaState.READY
        if ready and turn.now < victim.idle_since + hold_s(turn, victim):
            turn.state.models[victim.model].switches.append(turn.now)
        unload(turn, victim, "memory" if ready else "abandoned")


def drain(turn: Turn, name: str, victims: tuple[ReplicaId, ...]) -> None:
    """`victims` take no new sequences, for `name`; whoever was drained for it before and is not needed serves again."""
    model = turn.state.models[name]
    for replica_id in model.drains:
        replica = turn.state.replicas.get(replica_id)
        if replica is not None and replica_id not in victims:
            replica.draining_for = ""
            turn.touch(replica.model)
    model.drains = victims
    for replica_id in victims:
        turn.state.replicas[replica_id].draining_for = name


def look_again(turn: Turn, claim: Claim, devices: list[Device]) -> None:
    """When the next hold or patience is over; other news of room comes by itself."""
    nodes = {device.id.node: turn.state.nodes[device.id.node] for device in devices}
    there = (r for node in nodes.values() for device in node.devices.values() for r in residents(device))
    times = [leaves_at(turn, claim, replica) for replica in there]
    ahead = [at for at in times if turn.now < at < math.inf]
    if ahead:
        turn.state.timers.arm(("hungry", claim.model.spec.name), min(ahead))
