"""Sequences that a worker does not run, or no longer: each is tried again after a rest, with a new epoch. Where memory
for its KV is what lacks, idle models leave for it."""

from __future__ import annotations

from serverless_llm.cluster.events import SequenceRefused
from serverless_llm.cluster.sequences import current, reject, withdraw
from serverless_llm.cluster.starts import make_room
from serverless_llm.cluster.turn import Turn


def refused(turn: Turn, event: SequenceRefused) -> None:
    """In the end it is rejected; at once where its KV fits no device that there is."""
    sequence = current(turn, event.sequence, event.epoch)
    if sequence is None:
        return
    assert sequence.replica is not None
    device = turn.device(sequence.replica.device)
    if event.never and device.spec.budget >= turn.state.largest:
        message = f"{event.why}: ask for fewer, or serve with more --device-memory"
        reject(turn, sequence, 400, "context_length_exceeded", message, None, retry=False)
        return
    sequence.refusals += 1
    if sequence.refusals > turn.policy.refusals:
        message = f"the engine refused it {sequence.refusals} times: {event.why}"
        reject(turn, sequence, 503, "overloaded", message, turn.policy.retry_floor_s)
        return
    model = withdraw(turn, sequence, "refused")
    if model is None:
        return
    model.unready[sequence.id] = sequence
    turn.arm("rest", sequence.id, turn.policy.rest_s * 2.0 ** (sequence.refusals - 1))
    if event.missing:
        make_room(turn, model, device, event.missing, sequence.arrived)
