"""Room for the KV of sequences that a worker gave back, on replicas that serve. They wait for it as a model that
nothing serves waits for a place: idle models leave at once, those in steady use after their patience."""

from __future__ import annotations

from collections.abc import Hashable

from serverless_llm.cluster.promises import promise
from serverless_llm.cluster.replicas import send_off
from serverless_llm.cluster.sequences import reject
from serverless_llm.cluster.standing import protected
from serverless_llm.cluster.state import Device, Model, Replica, Sequence
from serverless_llm.cluster.turn import Turn
from serverless_llm.cluster.victims import (
    Claim,
    device_victims,
    drain,
    eviction_s,
    leaves,
    look_again,
    residents,
    send_away,
)
from serverless_llm.placement import choose, scale
from serverless_llm.quantities import size


def reject_impossible(turn: Turn, model: Model) -> None:
    """Who waits for room that models which may not leave have on every device is told."""
    for sequence in list(model.cramped.values()):
        devices = [device for device in turn.state.devices.values() if not device.drained]
        if devices and not any(_ever(turn, model, device, sequence) for device in devices):
            message = (
                f"its KV takes {size(sequence.kv_bytes)}, which no device has beside the weights and the models that "
                "may not leave (pinned, min_replicas): ask for fewer tokens, or serve with more --device-memory"
            )
            reject(turn, sequence, 400, "context_length_exceeded", message, None, retry=False)


def cramped(turn: Turn, model: Model) -> list[Sequence]:
    """Those that may run beside others, the eldest first."""
    free = (one for one in model.cramped.values() if one.id not in turn.state.suspects)
    return sorted(free, key=lambda one: one.order)


def grow(turn: Turn, model: Model) -> bool:
    """Promise each of the model's cramped sequences room, the eldest first; where only other devices could have it, a
    replica moves. False: one waits for it."""
    ready = [replica for replica in model.ready() if not replica.draining_for and _takes(turn, replica)]
    if not ready:
        return True
    for sequence in cramped(turn, model):
        if any(sequence.id in replica.promises for replica in ready) or _find(turn, sequence, ready):
            continue
        if any(_ever(turn, model, turn.device(replica.device), sequence) for replica in ready):
            _wait(turn, sequence, ready)
            return False
        send_off(turn, ready[0], "memory")
        return True
    return True


def _find(turn: Turn, sequence: Sequence, ready: list[Replica]) -> bool:
    """Whether there is room, or will be as soon as those that leave now have left."""
    options = [(_option(turn, sequence, replica, False), replica) for replica in ready]
    best = choose.best(option for option, _ in options if option)
    if best is None:
        return False
    send_away(turn, [turn.state.replicas[victim] for victim in best.victims])
    promise(turn, next(replica for option, replica in options if option is best), sequence)
    return True


def _wait(turn: Turn, sequence: Sequence, ready: list[Replica]) -> None:
    """For those that are in use."""
    turn.state.hungry[sequence.model] = None
    in_use = choose.best(o for o in (_option(turn, sequence, replica, True) for replica in ready) if o)
    drain(turn, sequence.model, in_use.victims if in_use else ())
    look_again(turn, _claim(turn, sequence), [turn.device(replica.device) for replica in ready])


def _option(turn: Turn, sequence: Sequence, replica: Replica, in_use: bool) -> choose.Option | None:
    device = turn.device(replica.device)
    more = max(0, sequence.kv_bytes - replica.kv_floor - replica.promised[1])
    short = more - device.planned.free + device.shortfall
    chosen = device_victims(turn, device, leaves(turn, _claim(turn, sequence), in_use, turn.now), short)
    if chosen is None:
        return None
    victims = tuple(victim for candidate in chosen for victim in candidate.replicas)
    return choose.Option(device.id, 0.0, eviction_s(turn, chosen), victims)


def _claim(turn: Turn, sequence: Sequence) -> Claim:
    return Claim(turn.state.models[sequence.model], scale.Want.FIRST, sequence.arrived)


def _takes(turn: Turn, replica: Replica) -> bool:
    device = turn.device(replica.device)
    return device.open and device.trial is None


def _ever(turn: Turn, model: Model, device: Device, sequence: Sequence) -> bool:
    """Whether the device could have the room once all that may leave have left; where its budget is known."""
    if device.spec.budget == 0:
        return True
    if device.failed_boots >= turn.policy.dead_boots:
        return False
    need = model.footprint.weight_bytes + sequence.kv_bytes
    charges: dict[Hashable, int] = {}
    for replica in residents(device):
        owner = turn.state.models.get(replica.model)
        if owner is model and not replica.retiring:
            need = sequence.kv_bytes - replica.kv_floor
            charges.update(replica.charges)
        elif owner is not None and not replica.retiring and protected(owner, replica):
            charges.update(replica.charges)
    return need + sum(charges.values()) <= device.spec.budget
