"""Sequences: they arrive, wait in their model's queue by arrival, run on one replica at a time, and end once."""

from __future__ import annotations

import math
from bisect import insort

from serverless_llm.cluster.commands import Cancel, Dispatch, Reject
from serverless_llm.cluster.events import (
    ClientGone,
    FirstToken,
    PromptReady,
    RequestArrived,
    Resumed,
    SequenceDone,
)
from serverless_llm.cluster.promises import unpromise
from serverless_llm.cluster.state import ON_WORKER, Device, Model, Replica, Sequence
from serverless_llm.cluster.transitions import SEQUENCE, SequenceState, move
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import SequenceId
from serverless_llm.placement import fit
from serverless_llm.quantities import size

# --- events ---


def arrived(turn: Turn, event: RequestArrived) -> None:
    model = turn.state.models.get(event.model)
    if event.sequence in turn.state.sequences:
        return
    if model is None:
        turn.emit(_not_found(event.sequence, event.model))
        return
    if model.footprint.checkpoint != event.checkpoint:
        turn.emit(_outdated(event.sequence))
        return
    if model.demand >= model.places() + model.spec.max_queue:
        message = f"{event.model} is busy, and its queue is full (max_queue {model.spec.max_queue})"
        turn.emit(Reject(event.sequence, 503, "overloaded", message, _retry_after(turn, model), True))
        return
    sequence = Sequence(
        event.sequence,
        event.model,
        model.revision,
        turn.state.next_order,
        turn.now,
        event.work_class,
        event.keep_alive,
        turn.history(),
    )
    turn.state.next_order += 1
    turn.state.sequences[sequence.id] = sequence
    model.unready[sequence.id] = sequence
    turn.touch(event.model)


def prompt_ready(turn: Turn, event: PromptReady) -> None:
    sequence = turn.state.sequences.get(event.sequence)
    if sequence is None or sequence.state is not SequenceState.TOKENISING:
        return
    sequence.prompt_tokens, sequence.max_tokens = event.prompt_tokens, event.max_tokens
    model = turn.state.models[sequence.model]
    move(SEQUENCE, sequence, "tokenised", turn.now)
    del model.unready[sequence.id]
    insort(model.waiting, sequence, key=_order)
    turn.touch(sequence.model)
    refuse_oversized(turn, model, sequence)


def resumed(turn: Turn, event: Resumed) -> None:
    """Tokens that its dead worker never reported are no progress of this run."""
    sequence = current(turn, event.sequence, event.epoch)
    if sequence is None:
        return
    if event.tokens > sequence.generated:
        sequence.generated, sequence.refusals = event.tokens, 0
    sequence.resumed_at = sequence.generated


def client_gone(turn: Turn, event: ClientGone) -> None:
    sequence = turn.state.sequences.get(event.sequence)
    if sequence is None:
        return
    _take_back(turn, sequence)
    end(turn, sequence)


def first_token(turn: Turn, event: FirstToken) -> None:
    sequence = current(turn, event.sequence, event.epoch)
    if sequence is not None:
        mentioned(turn, sequence, max(1, sequence.generated))


def done(turn: Turn, event: SequenceDone) -> None:
    sequence = current(turn, event.sequence, event.epoch)
    if sequence is not None:
        end(turn, sequence)


# --- deadlines ---


def rested(turn: Turn, sequence_id: SequenceId) -> None:
    sequence = turn.state.sequences[sequence_id]
    turn.touch(sequence.model)
    if sequence_id in turn.state.suspects:
        move(SEQUENCE, sequence, "suspected", turn.now)
        return
    model = turn.state.models[sequence.model]
    del model.unready[sequence_id]
    move(SEQUENCE, sequence, "rested", turn.now)
    insort(model.waiting, sequence, key=_order)


def unmentioned(turn: Turn, sequence_id: SequenceId) -> None:
    """Its worker may have spoken of it since the deadline was armed; if not, it is lost."""
    sequence = turn.state.sequences[sequence_id]
    left = sequence.mentioned + turn.policy.mention_s - turn.now
    if left > 0:
        turn.arm("mention", sequence_id, left)
    else:
        recall(turn, sequence)


# --- steps ---


def dispatch(turn: Turn, sequence: Sequence, replica: Replica) -> None:
    """From its queue to a worker."""
    model = turn.state.models[sequence.model]
    model.unready.pop(sequence.id, None)
    model.cramped.pop(sequence.id, None)
    for other in model.replicas.values():
        if other is not replica:
            unpromise(turn, other, sequence)
    move(SEQUENCE, sequence, "dispatch", turn.now)
    sequence.replica, sequence.mentioned, sequence.absent_since = replica, turn.now, None
    sequence.dispatched, sequence.resumed_at = turn.now, sequence.generated
    replica.running[sequence.id] = sequence
    replica.keep_alive = model.spec.keep_alive if sequence.keep_alive is None else sequence.keep_alive
    turn.disarm("idle", replica.id)
    turn.arm("mention", sequence.id, turn.policy.mention_s)
    phases = replica.phases if sequence.arrived < replica.ready_at else None
    queue_s = turn.now - sequence.arrived
    turn.emit(Dispatch(sequence.id, sequence.epoch, replica.id, replica.device, queue_s, phases))


def mentioned(turn: Turn, sequence: Sequence, generated: int) -> None:
    """Its worker spoke of it."""
    sequence.mentioned, sequence.absent_since = turn.now, None
    if generated > sequence.generated:
        sequence.generated, sequence.refusals = generated, 0
    if sequence.state is SequenceState.DISPATCHED:
        move(SEQUENCE, sequence, "token", turn.now)


def withdraw(turn: Turn, sequence: Sequence, cause: str) -> Model | None:
    """Take it off its worker; its epoch ends. None: its model is deleted or another by now, so that it was rejected."""
    _release(turn, sequence)
    sequence.epoch += 1
    move(SEQUENCE, sequence, cause, turn.now)
    model = turn.state.models.get(sequence.model)
    if model is not None and model.revision == sequence.revision:
        if sequence.kv_bytes:
            model.cramped[sequence.id] = sequence
        return model
    turn.emit(_not_found(sequence.id, sequence.model) if model is None else _outdated(sequence.id))
    _close(turn, sequence)
    return None


def requeue(turn: Turn, sequence: Sequence) -> None:
    """Back to its place in its model's queue, to be resumed elsewhere from its tokens."""
    if sequence.id in turn.state.suspects:
        suspect(turn, sequence)
        return
    model = withdraw(turn, sequence, "lost")
    if model is not None:
        insort(model.waiting, sequence, key=_order)


def suspect(turn: Turn, sequence: Sequence) -> None:
    """Off its worker, to be tried alone."""
    model = withdraw(turn, sequence, "suspected")
    if model is not None:
        turn.state.suspects[sequence.id] = sequence
        model.unready[sequence.id] = sequence


def recall(turn: Turn, sequence: Sequence) -> None:
    """Requeue a sequence whose worker lives: should it run there after all, it ends."""
    _take_back(turn, sequence)
    requeue(turn, sequence)


def accuse(turn: Turn, sequence: Sequence) -> None:
    """From its queue among those that are to be tried alone."""
    model = turn.state.models[sequence.model]
    model.waiting.remove(sequence)
    move(SEQUENCE, sequence, "suspected", turn.now)
    turn.state.suspects[sequence.id] = model.unready[sequence.id] = sequence


def current(turn: Turn, sequence_id: SequenceId, epoch: int) -> Sequence | None:
    """The sequence that a worker speaks of, unless what it says is out of date."""
    sequence = turn.state.sequences.get(sequence_id)
    if sequence is None or sequence.epoch != epoch or sequence.state not in ON_WORKER:
        return None
    return sequence


def reject(
    turn: Turn, sequence: Sequence, status: int, code: str, message: str, retry_after: float | None, retry: bool = True
) -> None:
    """End a sequence with an error."""
    turn.emit(Reject(sequence.id, status, code, message, retry_after, retry))
    end(turn, sequence)


def reject_not_found(turn: Turn, sequence: Sequence) -> None:
    turn.emit(_not_found(sequence.id, sequence.model))
    end(turn, sequence)


def reject_outdated(turn: Turn, sequence: Sequence) -> None:
    turn.emit(_outdated(sequence.id))
    end(turn, sequence)


def end(turn: Turn, sequence: Sequence) -> None:
    """Out of wherever it is."""
    model = turn.state.models.get(sequence.model)
    if sequence.state in ON_WORKER:
        _release(turn, sequence)
    elif model is not None:
        _leave_queue(turn, model, sequence)
    turn.touch(sequence.model)
    _close(turn, sequence)


def _leave_queue(turn: Turn, model: Model, sequence: Sequence) -> None:
    if sequence.state is SequenceState.WAITING:
        model.waiting.remove(sequence)
    else:
        del model.unready[sequence.id]
    model.cramped.pop(sequence.id, None)
    for replica in model.replicas.values():
        unpromise(turn, replica, sequence)


def refuse_oversized(turn: Turn, model: Model, sequence: Sequence) -> None:
    """Reject a waiting sequence whose KV can never fit. While no device is known, nothing is known to be too small."""
    tokens = sequence.prompt_tokens + sequence.max_tokens
    most = turn.state.largest
    if tokens > model.footprint.context:
        problem = f"{tokens} tokens (prompt and max_tokens) are more than the {model.footprint.context} of the context"
    elif most and not fit.holds_sequence(model.footprint, most, tokens):
        needed, left = model.footprint.kv_bytes(tokens), max(0, most - model.footprint.weight_bytes)
        problem = (
            f"the KV of {tokens} tokens (prompt and max_tokens) takes {size(needed)}; beside the weights at most "
            f"{size(left)} are available: ask for fewer, or serve with more --device-memory"
        )
    else:
        return
    reject(turn, sequence, 400, "context_length_exceeded", problem, None, retry=False)


def end_trial(turn: Turn, device: Device, trial: tuple[str, int]) -> None:
    """If `device` is given over to `trial`, it is open to all again: for as long as that took, if they want it."""
    if device.trial != trial:
        return
    took = turn.now - device.isolated_at
    device.trial, device.court_at = None, turn.now + took
    turn.arm("trial", device.id, took)
    turn.room = True
    for replica in device.replicas.values():
        turn.touch(replica.model)


def _order(sequence: Sequence) -> int:
    return sequence.order


def _take_back(turn: Turn, sequence: Sequence) -> None:
    """Off a worker that lives: it may be in a step with it until it says otherwise."""
    if sequence.replica is not None:
        turn.device(sequence.replica.device).recalled.add(sequence.id)
        turn.emit(Cancel(sequence.replica.device, sequence.id, sequence.epoch))


def _release(turn: Turn, sequence: Sequence) -> None:
    replica = sequence.replica
    assert replica is not None
    del replica.running[sequence.id]
    unpromise(turn, replica, sequence)
    sequence.replica = None
    turn.disarm("mention", sequence.id)
    if not replica.running:
        replica.idle_since = turn.now
        turn.idled.append(replica.id)
        turn.room = True
    turn.touch(replica.model)
    end_trial(turn, turn.device(replica.device), ("sequence", sequence.id))


def _close(turn: Turn, sequence: Sequence) -> None:
    move(SEQUENCE, sequence, "done", turn.now)
    turn.disarm("rest", sequence.id)
    del turn.state.sequences[sequence.id]
    if turn.state.suspects.pop(sequence.id, None) is not None:
        for device in turn.state.devices.values():
            end_trial(turn, device, ("sequence", sequence.id))


def _not_found(sequence: SequenceId, model: str) -> Reject:
    return Reject(sequence, 404, "model_not_found", f"the model {model!r} does not exist", None, False)


def _outdated(sequence: SequenceId) -> Reject:
    return Reject(sequence, 503, "model_loading", "the model was deployed anew before the request had ended", 1.0, True)


def _retry_after(turn: Turn, model: Model) -> float:
    """Seconds, whole ones: a second for each round of the queue, plus the start that is on its way."""
    rounds = math.ceil(model.demand / model.spec.max_concurrency)
    starting = sum(replica.predicted_s for replica in model.present() if not model.ready())
    return float(min(turn.policy.retry_cap_s, max(turn.policy.retry_floor_s, math.ceil(rounds + starting))))
