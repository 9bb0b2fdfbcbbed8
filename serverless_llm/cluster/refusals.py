"""Sequences that a worker does not run, or no longer: each is tried again after a rest, with a new epoch. Where memory
for its KV is what lacks, others leave for it."""

from __future__ import annotations

from serverless_llm.cluster.commands import GivenBack
from serverless_llm.cluster.events import SequenceRefused
from serverless_llm.cluster.growth import ever, make_room
from serverless_llm.cluster.sequences import current, reject, withdraw
from serverless_llm.cluster.standing import protected
from serverless_llm.cluster.state import Device, Model, Replica, Sequence
from serverless_llm.cluster.turn import Turn
from serverless_llm.quantities import size


def refused(turn: Turn, event: SequenceRefused) -> None:
    """In the end it is rejected; at once where its KV fits no device that there is."""
    sequence = current(turn, event.sequence, event.epoch)
    if sequence is None:
        return
    replica = sequence.replica
    assert replica is not None
    device = turn.device(replica.device)
    if event.never and device.spec.budget >= turn.state.largest:
        message = f"{event.why}: ask for fewer, or serve with more --device-memory"
        reject(turn, sequence, 400, "context_length_exceeded", message, None, retry=False)
        return
    sequence.refusals += 1
    if sequence.refusals > turn.policy.refusals:
        message = f"the engine refused it {sequence.refusals} times: {event.why}"
        reject(turn, sequence, 503, "overloaded", message, turn.policy.retry_floor_s)
        return
    rest_s = turn.policy.rest_s * 2.0 ** (sequence.refusals - 1)
    if event.missing and (event.begun or sequence.id in turn.state.suspects):
        rest_s = max(rest_s, make_room(turn, replica, event.missing, sequence.arrived) - turn.now)
    elif event.missing:
        _learn(turn, sequence, replica, event)
    model = withdraw(turn, sequence, "refused")
    if model is None:
        return
    turn.emit(GivenBack(sequence.id, sequence.model, device.id, event.why))
    model.unready[sequence.id] = sequence
    turn.arm("rest", sequence.id, rest_s)


def reject_impossible(turn: Turn, model: Model) -> None:
    """Who would have to wait for models that may not leave is told, unless it has begun: other devices may come."""
    devices = _able(turn, model) if model.cramped else []
    for sequence in [one for one in model.cramped.values() if devices and not one.generated]:
        if not any(ever(turn, model, device, sequence.kv_bytes) for device in devices):
            message = (
                f"its KV takes {size(sequence.kv_bytes)}, which no device has beside the weights and the models that "
                "may not leave (pinned, min_replicas): ask for fewer tokens, or serve with more --device-memory"
            )
            reject(turn, sequence, 400, "context_length_exceeded", message, None, retry=False)


def _able(turn: Turn, model: Model) -> list[Device]:
    """Devices that the model is on, or could be."""
    present = model.present()
    free = len(present) < model.spec.max_replicas or any(not protected(model, replica) for replica in present)
    return list(turn.state.devices.values()) if free else [turn.device(replica.device) for replica in present]


def _learn(turn: Turn, sequence: Sequence, replica: Replica, event: SequenceRefused) -> None:
    """What its KV takes, by the ledger; the worker, who counts in slabs, may have less left."""
    device = turn.device(replica.device)
    had = replica.kv_floor + device.actual.free
    alone = device.spec.budget - replica.footprint.weight_bytes
    sequence.kv_bytes = had + event.missing if event.never else min(had + event.missing, alone)
