"""Room beyond its replica's floor that is kept for the KV of a sequence: of one that a worker gave back, as weights had
that room. The ledger of what is planned has it, from when it was found until the sequence leaves the replica."""

from __future__ import annotations

from serverless_llm.cluster.state import PLANNED, Replica, Sequence
from serverless_llm.cluster.turn import Turn


def promise(turn: Turn, replica: Replica, sequence: Sequence) -> None:
    """`planned` of its device has that much free."""
    replica.promises[sequence.id] = sequence.kv_bytes
    _enter(turn, replica)
    turn.touch(replica.model)


def unpromise(turn: Turn, replica: Replica, sequence: Sequence) -> None:
    if replica.promises.pop(sequence.id, None) is not None:
        _enter(turn, replica)
        turn.room = True


def kept(turn: Turn, replica: Replica, sequence: Sequence) -> bool:
    """Whether the sequence can go there: what leaves for it has left."""
    device = turn.device(replica.device)
    return sequence.id in replica.promises and sequence.kv_bytes - replica.kv_floor <= device.actual.free


def _enter(turn: Turn, replica: Replica) -> None:
    """Sequences of one replica share what is promised to them, as they can give way to each other."""
    planned, key = turn.device(replica.device).planned, replica.promised[0]
    if key in planned.held:
        planned.remove(key)
    if replica.promises and replica.state in PLANNED:
        planned.add(*replica.promised)
