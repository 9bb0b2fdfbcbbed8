"""Where a replica starts, and who leaves for it.

Memory is given at once where it is free. A replica that others want is taken when it has been idle for its hold (as
long as bringing it back would take), so that the requests of one model are served together. One in steady use is
taken when a model that nothing serves has waited for its patience: it gets no new sequences, and leaves when those it
runs have ended. So a model waits for a place at most

    the load in progress there + patience_cap_s + the longest sequence running there

and, where k models wait for the same place, k times that: they get it in the order of their oldest waiters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from serverless_llm.cluster.commands import Decided
from serverless_llm.cluster.failures import reject_waiters
from serverless_llm.cluster.poison import isolate
from serverless_llm.cluster.replicas import hasten, start, unload
from serverless_llm.cluster.standing import abandoned, protected
from serverless_llm.cluster.state import PLANNED, STARTING, Device, Model, Node, Replica
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import CheckpointId, Footprint, ReplicaId
from serverless_llm.placement import choose, evict, fit, scale
from serverless_llm.placement.estimate import Links, Start, reuse, startup_s
from serverless_llm.quantities import enough, size


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that wants a replica; `since`: when the first of those who wait for it came."""

    model: Model
    want: scale.Want
    since: float


def consider(turn: Turn, model: Model) -> None:
    """Start a replica of `model` if it wants one and there is room, or can be; else note when to look again."""
    name = model.spec.name
    if model.demand:
        _hasten(turn, model)
    claim = Claim(model, wanted(turn, model), _since(turn, model))
    turn.state.hungry.pop(name, None)
    turn.disarm("hungry", name)
    if claim.want is scale.Want.NOTHING:
        drain(turn, name, ())
        return
    fitting = [device for device in turn.state.devices.values() if _fits(turn, model, device)]
    if claim.want is scale.Want.FIRST and turn.state.devices and _reject_hopeless(turn, model, fitting):
        drain(turn, name, ())
        return
    devices = [device for device in fitting if _open(turn, model, device)]
    option = choose.best(o for o in (_option(turn, claim, device, False) for device in devices) if o)
    if option is not None:
        _start(turn, claim, option)
        return
    turn.state.hungry[name] = None
    in_use = choose.best(o for o in (_option(turn, claim, device, True) for device in devices) if o)
    drain(turn, name, in_use.victims if in_use else ())
    _look_again(turn, claim, devices)


def _hasten(turn: Turn, model: Model) -> None:
    """Its starts that were made for nobody have somebody who waits now."""
    for replica in model.present():
        if replica.state in STARTING and not replica.online:
            hasten(turn, replica)


def _reject_hopeless(turn: Turn, model: Model, fitting: list[Device]) -> bool:
    """Whether nothing can ever serve the model, or only what does not come up; who waits is told.

    A budget of 0 says that the device's memory is not known: it may hold what the others do not.
    """
    devices = list(turn.state.devices.values())
    unknown = [device for device in devices if device.spec.budget == 0]
    able = fitting or unknown or devices
    if all(device.failed_boots >= turn.policy.dead_boots for device in able):
        problems = "; ".join(device.problem for device in able)
        reject_waiters(turn, model, f"no device comes up: {problems}", turn.policy.reboot_s)
    elif not fitting and not unknown:
        model.error = _too_large(turn, model)
        reject_waiters(turn, model, model.error, None)
    else:
        return False
    return True


def wanted(turn: Turn, model: Model) -> scale.Want:
    """Nothing while the model cools down."""
    if turn.now < model.cool_until:
        return scale.Want.NOTHING
    present = model.present()
    ready = [replica for replica in model.ready() if not replica.draining_for]
    return scale.wanted(
        scale.Demand(
            model.demand,
            model.requested_at is not None,
            len(present),
            sum(model.spec.max_concurrency - len(replica.running) for replica in ready),
            sum(replica.state in STARTING for replica in present),
            model.spec.min_replicas,
            model.spec.max_replicas,
            model.spare(),
        )
    )


def predicted_s(turn: Turn, model: Model, device: Device) -> tuple[float, float]:
    """Seconds that a start takes on `device`, and how many of them its bytes take."""
    node, footprint = turn.state.nodes[device.id.node], model.footprint
    remaining = _remaining(node, footprint.checkpoint, model.demand > 0)
    known = node.held(footprint.checkpoint, model.spec.verify)
    own = remaining.pop(footprint.checkpoint, _missing(node, footprint, known))
    disk, remote = (sum(column) for column in zip((0, 0), *remaining.values(), strict=True))
    begin = Start(disk, own.disk, 0 if device.view else footprint.weight_bytes, remote, own.remote)
    links = _links(turn, node)
    total = startup_s(begin, links)
    return total, total - links.overhead_s


def hold_s(turn: Turn, replica: Replica) -> float:
    """Seconds of idleness before others may have its memory."""
    return evict.hold_s(_bring_back_s(turn, replica), turn.policy.hold_floor_s, turn.policy.hold_cap_s)


def patience_s(turn: Turn, model: Model, replica: Replica) -> float:
    """Seconds that a model in steady use keeps its place while others wait."""
    while model.switches and model.switches[0] < turn.now - turn.policy.switch_window_s:
        model.switches.popleft()
    return evict.patience_s(
        _bring_back_s(turn, replica), turn.policy.patience_s, turn.policy.patience_cap_s, len(model.switches)
    )


def make_room(turn: Turn, model: Model, device: Device, missing: int, since: float) -> None:
    """Idle replicas of others leave the device, as for a model that nothing serves, so that the KV of a sequence that
    came at `since` has `missing` bytes more; none where that cannot be had."""
    claim = Claim(model, scale.Want.FIRST, since)

    def leaves(replica: Replica) -> bool:
        return not replica.running and _leaves_at(turn, claim, replica) <= turn.now

    for candidate in _device_victims(turn, device, leaves, missing) or ():
        _send_away(turn, [turn.state.replicas[replica] for replica in candidate.replicas])


# --- one device ---


def _fits(turn: Turn, model: Model, device: Device) -> bool:
    dram = turn.state.nodes[device.id.node].spec.dram
    return fit.holds_weights(model.footprint, device.spec, dram, _floor(turn, model, device))


def _open(turn: Turn, model: Model, device: Device) -> bool:
    """A second replica on one device gains nothing. Whose loads ended two workers loads where nothing else does."""
    twin = any(replica.device == device.id for replica in model.present())
    suspect = model.load_deaths >= turn.policy.suspect_deaths
    busy = suspect and any(replica.state in STARTING for replica in device.replicas.values())
    return device.open and device.trial is None and device.avoid_until <= turn.now and not twin and not busy


def _option(turn: Turn, claim: Claim, device: Device, in_use: bool) -> choose.Option | None:
    """What a start on `device` costs. `in_use`: reckon with the room of replicas that still run something."""
    footprint = claim.model.footprint

    def leaves(replica: Replica) -> bool:
        return (in_use or not replica.running) and _leaves_at(turn, claim, replica) <= turn.now

    short = footprint.weight_bytes + _floor(turn, claim.model, device) - device.planned.free + device.shortfall
    chosen = _device_victims(turn, device, leaves, short) if short > 0 else ()
    if chosen is None:
        return None
    if device.view:
        pinned = _dram_victims(turn, footprint, turn.state.nodes[device.id.node], leaves, chosen)
        if pinned is None:
            return None
        chosen += pinned
    cost = sum(c.bring_back_s * reuse(c.idle_s, turn.policy.reuse_half_s) for c in chosen)
    victims = tuple(replica for candidate in chosen for replica in candidate.replicas)
    crowd = sum(len(replica.running) for replica in device.replicas.values()), len(_residents(device))
    start_s, _ = predicted_s(turn, claim.model, device)
    return choose.Option(device.id, start_s, cost, victims, crowd)


def _device_victims(
    turn: Turn, device: Device, leaves: Callable[[Replica], bool], short: int
) -> tuple[evict.Candidate, ...] | None:
    """Who must leave so that so many bytes are free. What replicas share is free when all of them have left."""
    leaving = [replica for replica in _residents(device) if leaves(replica)]
    alone = evict.victims(_candidates(turn, device, [(replica,) for replica in leaving]), short)
    return alone or evict.victims(_candidates(turn, device, _sharers(leaving)), short)


def _candidates(turn: Turn, device: Device, groups: list[tuple[Replica, ...]]) -> list[evict.Candidate]:
    return [
        _candidate(turn, group, device.planned.freed(charge for replica in group for charge in replica.charges))
        for group in groups
    ]


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


def _dram_victims(
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
        for replica in _residents(device) if device.view else ():
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


def _leaves_at(turn: Turn, claim: Claim, victim: Replica) -> float:
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
    if victim.running or model.demand:
        return forced
    return min(forced, victim.idle_since + hold_s(turn, victim))


def _candidate(turn: Turn, replicas: tuple[Replica, ...], size: int) -> evict.Candidate:
    """Whoever is drained already goes first: the choice must not wander."""
    back = sum(0.0 if replica.draining_for else _bring_back_s(turn, replica) for replica in replicas)
    idle = min(0.0 if replica.running else turn.now - replica.idle_since for replica in replicas)
    return evict.Candidate(tuple(replica.id for replica in replicas), size, back, idle)


# --- decisions ---


def _start(turn: Turn, claim: Claim, option: choose.Option) -> None:
    model, device = claim.model, turn.device(option.device)
    seconds, transfer = predicted_s(turn, model, device)
    replica = Replica(
        turn.state.next_replica,
        model.spec.name,
        model.revision,
        device.id,
        model.footprint.checkpoint,
        model.footprint,
        model.spec.dtype,
        model.spec.source,
        _floor(turn, model, device),
        ReplicaState.CLAIMING,
        turn.now,
        turn.history(),
        model.spec.keep_alive,
        model.spec.verify,
        solicited=model.requested_at is not None or len(model.present()) < model.spec.min_replicas,
        online=model.demand > 0,
        predicted_s=seconds,
        transfer_s=transfer,
        idle_since=turn.now,
    )
    turn.state.next_replica += 1
    model.requested_at = None
    turn.emit(Decided(replica.id, replica.model, replica.device, replica.predicted_s, option.victims))
    _send_away(turn, [turn.state.replicas[victim] for victim in option.victims])
    start(turn, replica)
    if model.load_deaths >= turn.policy.suspect_deaths:
        isolate(turn, device, ("load", replica.id))


def _send_away(turn: Turn, victims: list[Replica]) -> None:
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


def _look_again(turn: Turn, claim: Claim, devices: list[Device]) -> None:
    """When the next hold or patience is over; other news of room comes by itself."""
    nodes = {device.id.node: turn.state.nodes[device.id.node] for device in devices}
    residents = (r for node in nodes.values() for device in node.devices.values() for r in _residents(device))
    times = [_leaves_at(turn, claim, replica) for replica in residents]
    ahead = [at for at in times if turn.now < at < math.inf]
    if ahead:
        turn.state.timers.arm(("hungry", claim.model.spec.name), min(ahead))


def _since(turn: Turn, model: Model) -> float:
    eldest = model.eldest()
    return turn.now if eldest is None else eldest


def impossible(turn: Turn, model: Model) -> str:
    """Why none of the devices that are there could ever hold it; empty while one could, or none is there."""
    devices = list(turn.state.devices.values())
    if not devices or any(device.spec.budget == 0 or _fits(turn, model, device) for device in devices):
        return ""
    return _too_large(turn, model)


def _too_large(turn: Turn, model: Model) -> str:
    footprint, policy = model.footprint, turn.policy
    needed = fit.least_budget(footprint, policy.kv_floor_tokens, policy.kv_floor_share)
    most = max(device.spec.budget for device in turn.state.devices.values())
    dram = max(node.spec.dram for node in turn.state.nodes.values())
    short = [
        f"it takes {enough(needed)} (weights and least KV) of a device that has at most {size(most)}: serve has"
        " --device-memory"
    ] * (needed > most) + [
        f"views of its weights take {size(footprint.file_bytes)} of a node's DRAM that has at most {size(dram)}: serve"
        " has --dram, and --weights copy"
    ] * (footprint.file_bytes > dram)
    return f"{model.spec.name} fits on no device: {'; '.join(short) or 'none has both the memory and the DRAM'}"


# --- what is known ---


def _floor(turn: Turn, model: Model, device: Device) -> int:
    policy = turn.policy
    return fit.kv_floor(model.footprint, device.spec.budget, policy.kv_floor_tokens, policy.kv_floor_share)


def _residents(device: Device) -> list[Replica]:
    return [replica for replica in device.replicas.values() if replica.state in PLANNED]


def _links(turn: Turn, node: Node) -> Links:
    known, policy = node.bandwidth, turn.policy
    return Links(
        known.get("remote", policy.remote_bps),
        known.get("disk", policy.disk_bps),
        known.get("upload", policy.upload_bps),
        node.overhead_s,
    )


class Missing(NamedTuple):
    """Bytes that a load still reads, by the link that they cross."""

    disk: int
    remote: int


def _missing(node: Node, footprint: Footprint, held: int) -> Missing:
    """`held`: bytes that are not read; what came to DRAM was written to a disk, too, before what did not."""
    left = max(0, footprint.file_bytes - held)
    remote = min(left, node.remote(footprint))
    return Missing(left - remote, remote)


def _remaining(node: Node, own: CheckpointId, online: bool) -> dict[CheckpointId, Missing]:
    """Bytes that starts on this node still read, by checkpoint: replicas of one checkpoint share its reading. An
    `online` start, of `own`, waits for no others that are not."""
    remaining: dict[CheckpointId, Missing] = {}
    residents = (replica for device in node.devices.values() for replica in device.replicas.values())
    for replica in residents:
        if replica.state in STARTING and (replica.online or not online or replica.checkpoint == own):
            held = max(replica.progress_done, node.held(replica.checkpoint, replica.verify))
            left = _missing(node, replica.footprint, held)
            remaining[replica.checkpoint] = min(left, remaining.get(replica.checkpoint, left))
    return remaining


def _bring_back_s(turn: Turn, replica: Replica) -> float:
    """Seconds to load it again where it is. Its bytes stay in DRAM when it leaves: view mode has them there."""
    device = turn.device(replica.device)
    node = turn.state.nodes[device.id.node]
    held = replica.footprint.file_bytes if device.view else node.held(replica.checkpoint, replica.verify)
    missing = _missing(node, replica.footprint, held)
    upload = 0 if device.view else replica.footprint.weight_bytes
    return startup_s(Start(0, missing.disk, upload, 0, missing.remote), _links(turn, node))
