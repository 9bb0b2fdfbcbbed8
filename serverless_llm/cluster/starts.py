"""Where a replica starts, and who leaves for it.

Memory is given at once where it is free. A replica that others want is taken when it has been idle for its hold (as
long as bringing it back would take), so that the requests of one model are served together. One in steady use is
taken when a model that nothing serves has waited for its patience: it gets no new sequences, and leaves when those it
runs have ended. So a model waits for a place at most

    the load in progress there + patience_cap_s + the longest sequence running there

and, where k models wait for the same place, k times that: they get it in the order of their oldest waiters.
"""

from __future__ import annotations

from serverless_llm.cluster.commands import Decided
from serverless_llm.cluster.estimates import floor, predicted_s
from serverless_llm.cluster.failures import reject_waiters
from serverless_llm.cluster.growth import claim_of, cramped, ever, grow, wait
from serverless_llm.cluster.poison import isolate
from serverless_llm.cluster.promises import promise
from serverless_llm.cluster.refusals import reject_impossible
from serverless_llm.cluster.replicas import hasten, send_off, start
from serverless_llm.cluster.standing import protected
from serverless_llm.cluster.state import STARTING, Device, Model, Replica, Sequence
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.cluster.victims import (
    Claim,
    device_victims,
    drain,
    dram_victims,
    eviction_s,
    leaves,
    look_again,
    residents,
    send_away,
)
from serverless_llm.placement import choose, fit, scale
from serverless_llm.quantities import enough, size


def consider(turn: Turn, model: Model) -> None:
    """Start a replica of `model` if it wants one and there is room, or can be; else note when to look again."""
    name = model.spec.name
    if model.demand:
        _hasten(turn, model)
    turn.state.hungry.pop(name, None)
    turn.disarm("hungry", name)
    reject_impossible(turn, model)
    lacking = grow(turn, model)
    if lacking is not None and _begin_elsewhere(turn, lacking):
        return
    claim, devices = _claim(turn, model), []
    if claim.want is not scale.Want.NOTHING:
        fitting = [device for device in turn.state.devices.values() if _fits(turn, model, device)]
        if claim.want is scale.Want.FIRST and turn.state.devices and _reject_hopeless(turn, model, fitting):
            drain(turn, name, ())
            return
        devices = [device for device in fitting if _open(turn, model, device)]
        if _begin(turn, claim, devices):
            return
    if lacking is not None:
        _wait(turn, lacking)
    elif claim.want is scale.Want.NOTHING:
        drain(turn, name, ())
    else:
        _go_hungry(turn, claim, devices)


def _begin(turn: Turn, claim: Claim, devices: list[Device]) -> bool:
    option = choose.best(o for o in (_option(turn, claim, device, False) for device in devices) if o)
    if option is not None:
        _start(turn, claim, option)
    return option is not None


def _claim(turn: Turn, model: Model) -> Claim:
    """Of those that lacked room for their KV the eldest has it where its model starts, if a device there can be."""
    want = wanted(turn, model)
    devices = [device for device in turn.state.devices.values() if device.open]
    able = (one for one in cramped(turn, model) if any(ever(turn, model, device, one.kv_bytes) for device in devices))
    return Claim(model, want, _since(turn, model), next(able, None) if want is scale.Want.FIRST else None)


def _begin_elsewhere(turn: Turn, sequence: Sequence) -> bool:
    """Whether its model starts where its KV can be. If it may have no more replicas, it leaves where that cannot be."""
    model, devices = turn.state.models[sequence.model], _elsewhere(turn, sequence)
    leaving = _surplus(model)
    if not devices or not _begin(turn, claim_of(turn, sequence), devices):
        return False
    for replica in leaving:
        send_off(turn, replica, "memory")
    return True


def _wait(turn: Turn, sequence: Sequence) -> None:
    devices = _elsewhere(turn, sequence)
    if devices:
        _go_hungry(turn, claim_of(turn, sequence), devices)
    else:
        wait(turn, sequence)


def _elsewhere(turn: Turn, sequence: Sequence) -> list[Device]:
    """Where a sequence could have its KV that can have it nowhere that its model is."""
    model = turn.state.models[sequence.model]
    here = any(ever(turn, model, turn.device(one.device), sequence.kv_bytes) for one in model.present())
    stays = len(model.present()) >= model.spec.max_replicas and not _surplus(model)
    if here or stays or turn.now < model.cool_until:
        return []
    fitting = [one for one in turn.state.devices.values() if _fits(turn, model, one) and _open(turn, model, one)]
    return [device for device in fitting if ever(turn, model, device, sequence.kv_bytes)]


def _surplus(model: Model) -> list[Replica]:
    """Which of a model's replicas, if any has to, may leave for another."""
    full = len(model.present()) >= model.spec.max_replicas
    return [one for one in model.present() if full and not protected(model, one)][:1]


def _go_hungry(turn: Turn, claim: Claim, devices: list[Device]) -> None:
    """Whoever is in the way, and in use, takes nothing new once its patience is over; note when to look again."""
    name = claim.model.spec.name
    turn.state.hungry[name] = None
    in_use = choose.best(o for o in (_option(turn, claim, device, True) for device in devices) if o)
    drain(turn, name, in_use.victims if in_use else ())
    look_again(turn, claim, devices)


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


# --- one device ---


def _fits(turn: Turn, model: Model, device: Device) -> bool:
    dram = turn.state.nodes[device.id.node].spec.dram
    return fit.holds_weights(model.footprint, device.spec, dram, floor(turn, model, device))


def _open(turn: Turn, model: Model, device: Device) -> bool:
    """A second replica on one device gains nothing. Whose loads ended two workers loads where nothing else does."""
    twin = any(replica.device == device.id for replica in model.present())
    suspect = model.load_deaths >= turn.policy.suspect_deaths
    busy = suspect and any(replica.state in STARTING for replica in device.replicas.values())
    return device.open and device.trial is None and device.avoid_until <= turn.now and not twin and not busy


def _option(turn: Turn, claim: Claim, device: Device, in_use: bool) -> choose.Option | None:
    """What a start on `device` costs. `in_use`: reckon with the room of replicas that still run something."""
    footprint, may = claim.model.footprint, leaves(turn, claim, in_use, turn.now)
    kv_bytes = max(floor(turn, claim.model, device), claim.sequence.kv_bytes if claim.sequence else 0)
    short = footprint.weight_bytes + kv_bytes - device.planned.free + device.shortfall
    chosen = device_victims(turn, device, may, short)
    if chosen is None:
        return None
    if device.view:
        pinned = dram_victims(turn, footprint, turn.state.nodes[device.id.node], may, chosen)
        if pinned is None:
            return None
        chosen += pinned
    victims = tuple(replica for candidate in chosen for replica in candidate.replicas)
    crowd = sum(len(replica.running) for replica in device.replicas.values()), len(residents(device))
    return choose.Option(device.id, predicted_s(turn, claim.model, device), eviction_s(turn, chosen), victims, crowd)


# --- decisions ---


def _start(turn: Turn, claim: Claim, option: choose.Option) -> None:
    model, device = claim.model, turn.device(option.device)
    replica = Replica(
        turn.state.next_replica,
        model.spec.name,
        model.revision,
        device.id,
        model.footprint.checkpoint,
        model.footprint,
        model.spec.dtype,
        model.spec.source,
        floor(turn, model, device),
        ReplicaState.CLAIMING,
        turn.now,
        turn.history(),
        model.spec.keep_alive,
        model.spec.verify,
        solicited=model.requested_at is not None or len(model.present()) < model.spec.min_replicas,
        online=model.demand > 0,
        predicted_s=predicted_s(turn, model, device),
        idle_since=turn.now,
    )
    turn.state.next_replica += 1
    model.requested_at = None
    turn.emit(Decided(replica.id, replica.model, replica.device, replica.predicted_s, option.victims))
    send_away(turn, [turn.state.replicas[victim] for victim in option.victims])
    start(turn, replica)
    if claim.sequence is not None:
        promise(turn, replica, claim.sequence)
    if model.load_deaths >= turn.policy.suspect_deaths:
        isolate(turn, device, ("load", replica.id))


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
