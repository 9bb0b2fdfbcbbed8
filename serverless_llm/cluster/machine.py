"""The control plane as one function: event in, commands out. No clock, no socket, no randomness.

Every turn: the event's handler changes the state, deadlines that have passed act, the scheduling pass looks at what
changed, and a `WakeAt` asks for the next tick if it is due before the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serverless_llm.cluster import events as e
from serverless_llm.cluster import models, nodes, poison, refusals, replicas, schedule, sequences
from serverless_llm.cluster.commands import Command, WakeAt
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import State
from serverless_llm.cluster.turn import Turn


def _nothing(turn: Turn, event: e.Tick) -> None:
    """Time is all that a tick brings."""


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    e.Deploy: models.deploy,
    e.Delete: models.delete,
    e.Load: models.load,
    e.UnloadModel: models.unload_model,
    e.Pin: models.pin,
    e.Drain: nodes.drain,
    e.RequestArrived: sequences.arrived,
    e.PromptReady: sequences.prompt_ready,
    e.Resumed: sequences.resumed,
    e.ClientGone: sequences.client_gone,
    e.FirstToken: sequences.first_token,
    e.SequenceDone: sequences.done,
    e.SequenceRefused: refusals.refused,
    e.Progress: nodes.progress,
    e.Reserved: replicas.reserved,
    e.Refused: replicas.refused,
    e.LoadProgress: replicas.progressed,
    e.ReplicaReady: replicas.ready,
    e.LoadFailed: replicas.load_failed,
    e.Unloaded: replicas.unloaded,
    e.NodeJoined: nodes.joined,
    e.NodeLost: nodes.node_lost,
    e.Heartbeat: nodes.heartbeat,
    e.WorkerUp: nodes.worker_up,
    e.WorkerLost: nodes.worker_lost,
    e.Tick: _nothing,
}

DEADLINES: dict[str, Callable[[Turn, Any], None]] = {
    "replica": replicas.overdue,  # an answer to Reserve, StartLoad or Unload
    "idle": schedule.keep_alive_over,
    "abandon": schedule.abandoned_for_long,
    "mention": sequences.unmentioned,  # an answer to Dispatch, then news of the sequence
    "rest": sequences.rested,
    "kill": nodes.kill_overdue,
    "drop": nodes.drop_overdue,
    "silent": nodes.silent,
    "avoid": replicas.avoided,
    "short": replicas.sated,
    "trial": poison.outlived,
    "cool": models.cooled,
    "hungry": schedule.hold_over,
}

IDS = 1 << 32  # replica ids of one generation


class Machine:
    """The one owner of the cluster's state; `state` may be read between two calls of `handle`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.state = State()
        self._now = 0.0
        self._wake: float | None = None

    def number_replicas(self, generation: int) -> None:
        """Before the first event: no former generation's replica, which an agent may still hold, has an id of ours."""
        self.state.next_replica = generation * IDS + 1

    def handle(self, event: e.Event, now: float) -> list[Command]:
        """What is to be done now that `event` has happened. `now`: seconds of any clock that does not run back."""
        self._now = max(self._now, now)
        if isinstance(event, e.Tick) or (self._wake is not None and self._wake <= self._now):
            self._wake = None
        turn = Turn(self.state, self.policy, self._now)
        HANDLERS[type(event)](turn, event)
        for kind, key in self.state.timers.due(self._now):
            DEADLINES[kind](turn, key)
        schedule.settle(turn)
        self._ask_for_tick(turn)
        return turn.commands

    def _ask_for_tick(self, turn: Turn) -> None:
        """A tick that is needed no more, or comes a moment early (timers round), does nothing but ask again."""
        earliest = self.state.timers.earliest()
        if earliest is not None and (self._wake is None or earliest < self._wake):
            self._wake = earliest
            turn.emit(WakeAt(earliest))
