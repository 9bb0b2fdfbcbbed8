"""Room for the KV of sequences that a worker gave back. They wait for it as a model that nothing serves waits for a
place: idle models leave at once, those in steady use after their patience."""

from __future__ import annotations

import math

from serverless_llm.cluster.promises import promise
from serverless_llm.cluster.standing import protected
from serverless_llm.cluster.state import Device, Model, Replica, Sequence
from serverless_llm.cluster.turn import Turn
from serverless_llm.cluster.victims import (
    Claim,
    device_victims,
    drain,
    eviction_s,
    leaves,
    leaves_at,
    look_again,
    residents,
    send_away,
)
from serverless_llm.placement import choose, scale


def cramped(turn: Turn, model: Model) -> list[Sequence]:
    """Those that may run beside others, the eldest first."""
    free = (one for one in model.cramped.values() if one.id not in turn.state.suspects)
    return sorted(free, key=lambda one: one.order)


def grow(turn: Turn, model: Model) -> Sequence | None:
    """Promise each of the model's cramped sequences room on replicas that serve; the eldest that finds none."""
    lacking = None
    growing = _growing(turn, model)
    for sequence in cramped(turn, model) if growing else ():
        promised = any(sequence.id in replica.promises for replica in growing)
        if not promised and not _find(turn, sequence, growing) and lacking is None:
            lacking = sequence
    return lacking


def wait(turn: Turn, sequence: Sequence) -> None:
    """For those that are in use where its model serves."""
    growing = _growing(turn, turn.state.models[sequence.model])
    turn.state.hungry[sequence.model] = None
    in_use = choose.best(o for o in (_growth(turn, sequence, replica, True) for replica in growing) if o)
    drain(turn, sequence.model, in_use.victims if in_use else ())
    look_again(turn, claim_of(turn, sequence), [turn.device(replica.device) for replica in growing])


def claim_of(turn: Turn, sequence: Sequence) -> Claim:
    return Claim(turn.state.models[sequence.model], scale.Want.FIRST, sequence.arrived, sequence)


def make_room(turn: Turn, replica: Replica, missing: int, since: float) -> float:
    """Idle replicas of others leave its device, so that `missing` bytes more are free for the KV of a sequence that
    came at `since`; none where that cannot be had.

    Returns:
        When they may: where some have to be idle for longer first, none leaves before.
    """
    device, model = turn.device(replica.device), turn.state.models.get(replica.model)
    if model is None or replica.retiring or not device.open:
        return turn.now
    short = missing - device.planned.free + device.actual.free - replica.promised[1]
    claim = Claim(model, scale.Want.FIRST, since)
    times = {max(turn.now, leaves_at(turn, claim, one)) for one in residents(device) if not one.running}
    for at in sorted(times - {math.inf}):
        chosen = device_victims(turn, device, leaves(turn, claim, False, at), short)
        if chosen is not None:
            if at <= turn.now:
                send_away(turn, [turn.state.replicas[victim] for one in chosen for victim in one.replicas])
            return at
    return turn.now


def ever(turn: Turn, model: Model, device: Device, kv_bytes: int) -> bool:
    """Whether the device could have such a sequence once all that may leave have left; where its budget is known."""
    own = [one for one in residents(device) if one.model == model.spec.name and not one.retiring]
    need = kv_bytes - own[0].kv_floor if own else model.footprint.weight_bytes + kv_bytes
    held = dict(charge for one in residents(device) if one in own or _stays(turn, one) for charge in one.charges)
    fits = need + sum(held.values()) <= device.spec.budget or device.spec.budget == 0
    return fits and (bool(own) or not device.view or _files_fit(turn, model, device))


def _files_fit(turn: Turn, model: Model, device: Device) -> bool:
    node = turn.state.nodes[device.id.node]
    files = {model.footprint.checkpoint: model.footprint.file_bytes}
    for one in (one for other in node.devices.values() if other.view for one in residents(other)):
        if _stays(turn, one):
            files[one.checkpoint] = one.footprint.file_bytes
    return sum(files.values()) <= node.spec.dram


def _stays(turn: Turn, replica: Replica) -> bool:
    model = turn.state.models.get(replica.model)
    return model is not None and not replica.retiring and protected(model, replica)


def _growing(turn: Turn, model: Model) -> list[Replica]:
    """Replicas that take new sequences."""
    devices = turn.state.devices
    ready = (one for one in model.ready() if not one.draining_for)
    return [one for one in ready if devices[one.device].open and devices[one.device].trial is None]


def _find(turn: Turn, sequence: Sequence, growing: list[Replica]) -> bool:
    """Whether there is room, or will be as soon as those that leave now have left."""
    options = [(_growth(turn, sequence, replica, False), replica) for replica in growing]
    best = choose.best(option for option, _ in options if option)
    if best is None:
        return False
    send_away(turn, [turn.state.replicas[victim] for victim in best.victims])
    promise(turn, next(replica for option, replica in options if option is best), sequence)
    return True


def _growth(turn: Turn, sequence: Sequence, replica: Replica, in_use: bool) -> choose.Option | None:
    """What room for it on `replica` costs. `in_use`: reckon with that of replicas that still run something."""
    device = turn.device(replica.device)
    more = max(0, sequence.kv_bytes - replica.kv_floor - replica.promised[1])
    short = more - device.planned.free + device.shortfall if more else 0
    chosen = device_victims(turn, device, leaves(turn, claim_of(turn, sequence), in_use, turn.now), short)
    if chosen is None:
        return None
    victims = tuple(victim for candidate in chosen for victim in candidate.replicas)
    return choose.Option(device.id, 0.0, eviction_s(turn, chosen), victims)
