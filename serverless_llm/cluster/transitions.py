"""The lives of replicas, sequences and nodes, as tables of (state, cause) -> state.

    replica   CLAIMING -room-> RESERVING -reserved-> LOADING -ready-> READY -evict-> UNLOADING -unloaded-> GONE
    sequence  TOKENISING -tokenised-> WAITING -dispatch-> DISPATCHED -token-> RUNNING -done-> DONE
    node      UP -silent-> DROPPED -lost-> GONE

A cause that the table does not know is a bug of the machine, never of the network: handlers ignore late events
before they get here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol, TypeVar

from serverless_llm.errors import InvariantError


class ReplicaState(StrEnum):
    CLAIMING = "claiming"  # decided; what leaves for it still holds the memory
    RESERVING = "reserving"  # the worker was asked to free KV
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    GONE = "gone"


class SequenceState(StrEnum):
    TOKENISING = "tokenising"
    WAITING = "waiting"
    RESTING = "resting"  # a worker refused it: tried again a little later
    SUSPECT = "suspect"  # two workers died with it: to be tried alone
    DISPATCHED = "dispatched"
    RUNNING = "running"
    DONE = "done"


class NodeState(StrEnum):
    UP = "up"
    DROPPED = "dropped"  # silent: nothing there counts any more, its link is being closed
    GONE = "gone"


R = ReplicaState
S = SequenceState
N = NodeState

REPLICA: Mapping[tuple[R, str], R] = {
    (R.CLAIMING, "room"): R.RESERVING,
    (R.CLAIMING, "cancel"): R.GONE,
    (R.CLAIMING, "lost"): R.GONE,
    (R.RESERVING, "reserved"): R.LOADING,
    (R.RESERVING, "refused"): R.GONE,
    (R.RESERVING, "cancel"): R.UNLOADING,
    (R.RESERVING, "lost"): R.GONE,
    (R.LOADING, "ready"): R.READY,
    (R.LOADING, "failed"): R.UNLOADING,
    (R.LOADING, "expired"): R.UNLOADING,
    (R.LOADING, "cancel"): R.UNLOADING,
    (R.LOADING, "lost"): R.GONE,
    (R.READY, "evict"): R.UNLOADING,
    (R.READY, "absent"): R.GONE,
    (R.READY, "lost"): R.GONE,
    (R.UNLOADING, "unloaded"): R.GONE,
    (R.UNLOADING, "absent"): R.GONE,
    (R.UNLOADING, "lost"): R.GONE,
}

SEQUENCE: Mapping[tuple[S, str], S] = {
    (S.TOKENISING, "tokenised"): S.WAITING,
    (S.WAITING, "dispatch"): S.DISPATCHED,
    (S.WAITING, "suspected"): S.SUSPECT,
    (S.SUSPECT, "dispatch"): S.DISPATCHED,
    (S.RESTING, "rested"): S.WAITING,
    (S.RESTING, "suspected"): S.SUSPECT,
    (S.DISPATCHED, "token"): S.RUNNING,
    (S.DISPATCHED, "refused"): S.RESTING,
    (S.RUNNING, "refused"): S.RESTING,
    (S.DISPATCHED, "lost"): S.WAITING,
    (S.RUNNING, "lost"): S.WAITING,
    (S.DISPATCHED, "suspected"): S.SUSPECT,
    (S.RUNNING, "suspected"): S.SUSPECT,
} | {(state, "done"): S.DONE for state in S if state is not S.DONE}

NODE: Mapping[tuple[N, str], N] = {
    (N.UP, "silent"): N.DROPPED,
    (N.UP, "lost"): N.GONE,
    (N.DROPPED, "lost"): N.GONE,
}


T = TypeVar("T", ReplicaState, SequenceState, NodeState)


class Living(Protocol[T]):
    """A replica, sequence or node: where it is in its life, and how it came there."""

    state: T
    history: deque[tuple[float, str]]


def move(table: Mapping[tuple[T, str], T], thing: Living[T], cause: str, now: float) -> None:
    """Move `thing` along its table.

    Raises:
        InvariantError: the table knows no such step; the message tells the thing's life so far.
    """
    successor = table.get((thing.state, cause))
    if successor is None:
        raise InvariantError(f"{thing.state} knows no {cause!r} at {now}: {thing!r} after {list(thing.history)}")
    thing.history.append((now, cause))
    thing.state = successor
