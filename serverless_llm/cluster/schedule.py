"""The scheduling pass at the end of a turn: it looks at what changed, and at nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

from serverless_llm.cluster.failures import reject_waiters, retry_after
from serverless_llm.cluster.poison import try_suspects
from serverless_llm.cluster.promises import kept
from serverless_llm.cluster.replicas import unload
from serverless_llm.cluster.sequences import dispatch
from serverless_llm.cluster.standing import abandoned, protected
from serverless_llm.cluster.starts import consider
from serverless_llm.cluster.state import STARTING, Model, Replica, Sequence
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import ModelName, ReplicaId


def settle(turn: Turn) -> None:
    """Until nothing is left to do: suspects first, then who can be served, then who wants a replica, eldest first."""
    while turn.dirty or turn.room or turn.idled:
        _send_off(turn)
        try_suspects(turn)
        touched, turn.dirty = turn.dirty, {}
        looking = {**(turn.state.hungry if turn.room else {}), **touched}
        turn.room = False
        for name in touched:
            if name in turn.state.models:
                _tend(turn, turn.state.models[name])
        for name in sorted((name for name in looking if name in turn.state.models), key=_by_eldest(turn)):
            consider(turn, turn.state.models[name])


def keep_alive_over(turn: Turn, replica_id: ReplicaId) -> None:
    turn.touch(turn.state.replicas[replica_id].model)


def abandoned_for_long(turn: Turn, replica_id: ReplicaId) -> None:
    replica = turn.state.replicas[replica_id]
    model = turn.state.models[replica.model]
    if abandoned(model, replica):
        unload(turn, replica, "abandoned")


def hold_over(turn: Turn, name: ModelName) -> None:
    turn.touch(name)


def _send_off(turn: Turn) -> None:
    idled, turn.idled = turn.idled, []
    for replica_id in idled:
        replica = turn.state.replicas.get(replica_id)
        if replica is not None and replica.retiring and replica.state is ReplicaState.READY and not replica.running:
            unload(turn, replica, replica.retiring)


def _tend(turn: Turn, model: Model) -> None:
    if turn.now < model.cool_until and not model.present():
        reject_waiters(turn, model, model.error, retry_after(turn, model))
    passed = 0  # they wait for room of their own
    while passed < len(model.waiting):
        sequence = model.waiting[passed]
        replica = _least_busy(turn, model, sequence)
        if replica is not None:
            dispatch(turn, model.waiting.pop(passed), replica)
        elif sequence.kv_bytes:
            passed += 1
        else:
            break
    for replica in model.present():
        if replica.state in STARTING:
            _watch_load(turn, model, replica)
        elif not replica.running:
            _watch_idle(turn, model, replica)


def _least_busy(turn: Turn, model: Model, sequence: Sequence) -> Replica | None:
    free = [replica for replica in model.ready() if _takes(turn, model, replica)]
    if sequence.kv_bytes:
        free = [replica for replica in free if kept(turn, replica, sequence)]
    return min(free, key=lambda replica: (len(replica.running), replica.device, replica.id), default=None)


def _takes(turn: Turn, model: Model, replica: Replica) -> bool:
    device = turn.device(replica.device)
    open_ = device.usable and device.trial is None and not replica.draining_for
    return open_ and len(replica.running) < model.spec.max_concurrency


def _watch_load(turn: Turn, model: Model, replica: Replica) -> None:
    key = ("abandon", replica.id)
    if not abandoned(model, replica):
        turn.state.timers.disarm(key)
    elif key not in turn.state.timers:
        turn.arm(*key, turn.policy.abandon_after)


def _watch_idle(turn: Turn, model: Model, replica: Replica) -> None:
    """Unload it if its keep-alive is over, or look again when it will be."""
    turn.disarm("idle", replica.id)
    if model.demand or protected(model, replica) or math.isinf(replica.keep_alive):
        return
    left = replica.idle_since + replica.keep_alive - turn.now
    if left > 0:
        turn.arm("idle", replica.id, left)
    else:
        unload(turn, replica, "keep-alive")


def _by_eldest(turn: Turn) -> Callable[[ModelName], tuple[float, int]]:
    def key(name: ModelName) -> tuple[float, int]:
        model = turn.state.models[name]
        eldest = model.eldest()
        return (math.inf if eldest is None else eldest, model.revision)

    return key
