"""What is always true between two turns. Each check has a name, so that a broken one tells which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from serverless_llm.cluster.ledger import Ledger
from serverless_llm.cluster.state import ACTUAL, ON_WORKER, PLANNED, Replica, State
from serverless_llm.cluster.transitions import NodeState, ReplicaState, SequenceState
from serverless_llm.errors import InvariantError


def check_invariants(state: State) -> None:
    """Raises:
    InvariantError: naming the check, and what broke it.
    """
    for name, check in CHECKS.items():
        for problem in check(state):
            raise InvariantError(f"{name}: {problem}")


def _one_owner(state: State) -> Iterator[object]:
    """A sequence on a worker is in exactly the one replica that it names; a waiting one is in none."""
    owners: dict[int, Replica] = {}
    for replica in state.replicas.values():
        for sequence in replica.running.values():
            if sequence.id in owners or sequence.replica is not replica or sequence.state not in ON_WORKER:
                yield sequence, replica
            owners[sequence.id] = replica
    for sequence in state.sequences.values():
        if (sequence.id in owners) != (sequence.state in ON_WORKER):
            yield sequence


def _one_queue(state: State) -> Iterator[object]:
    """A sequence that waits is once in its model's queue, in order of arrival; nothing else is there."""
    queued = 0
    for model in state.models.values():
        queued += model.demand
        orders = [sequence.order for sequence in model.waiting]
        if orders != sorted(set(orders)):
            yield model.spec.name, orders
        for sequence in model.waiting:
            if sequence.state is not SequenceState.WAITING or state.sequences.get(sequence.id) is not sequence:
                yield sequence
        for sequence in model.unready.values():
            if sequence.state in ON_WORKER or state.sequences.get(sequence.id) is not sequence:
                yield sequence
        cramped = {s.id: s for s in (*model.waiting, *model.unready.values()) if s.kv_bytes}
        if model.cramped != cramped:
            yield model.spec.name, model.cramped
    if queued != sum(sequence.state not in ON_WORKER for sequence in state.sequences.values()):
        yield queued


def _busy_are_ready(state: State) -> Iterator[object]:
    """Only a replica that is ready, on a worker that is up, runs sequences, and no more than it may."""
    for replica in state.replicas.values():
        if replica.running and replica.state is not ReplicaState.READY:
            yield replica
        if not state.devices[replica.device].incarnation:
            yield replica


def _ledgers_equal_residencies(state: State) -> Iterator[object]:
    for node in state.nodes.values():
        for states, dram in ((PLANNED, node.planned_dram), (ACTUAL, node.actual_dram)):
            pins: dict[object, int] = {}
            for device in node.devices.values():
                held = [replica for replica in device.replicas.values() if replica.state in states]
                ledger = device.planned if states is PLANNED else device.actual
                charges = Counter(charge for replica in held for charge in replica.charges)
                charges += Counter(replica.promised for replica in held if replica.promises and states is PLANNED)
                if ledger.held != {key: (count, size) for (key, size), count in charges.items()}:
                    yield device, ledger
                for replica in held if device.view else ():
                    pins[replica.checkpoint] = pins.get(replica.checkpoint, 0) + 1
            if pins != {key: holders for key, (holders, _) in dram.held.items()}:
                yield node, dram


def _ledgers_within_budget(state: State) -> Iterator[object]:
    ledgers: list[Ledger] = []
    for device in state.devices.values():
        ledgers += [device.planned, device.actual]
    for node in state.nodes.values():
        ledgers += [node.planned_dram, node.actual_dram]
    for ledger in ledgers:
        if ledger.used != sum(size for _, size in ledger.held.values()) or ledger.free < 0:
            yield ledger


def _indexes_agree(state: State) -> Iterator[object]:
    """Every replica is known to its device and to its model, and to nobody else; a model has one of them a device."""
    on_devices = [replica for device in state.devices.values() for replica in device.replicas.values()]
    if sorted(replica.id for replica in on_devices) != sorted(state.replicas):
        yield sorted(state.replicas)
    for model in state.models.values():
        for replica in model.replicas.values():
            if state.replicas.get(replica.id) is not replica or replica.model != model.spec.name:
                yield replica
        present = model.present()
        if len(present) > max(model.spec.max_replicas, model.spec.min_replicas):
            yield model
        if len({replica.device for replica in present}) < len(present):
            yield present
    for name in state.hungry:
        if name not in state.models:
            yield name


def _commands_have_deadlines(state: State) -> Iterator[object]:
    """Whatever awaits an answer awaits it for a limited time."""
    awaiting = {ReplicaState.RESERVING, ReplicaState.LOADING, ReplicaState.UNLOADING}
    for replica in state.replicas.values():
        armed = ("replica", replica.id) in state.timers or state.devices[replica.device].killing
        if replica.state in awaiting and not armed:
            yield replica
    for sequence in state.sequences.values():
        if (sequence.state in ON_WORKER) != (("mention", sequence.id) in state.timers):
            yield sequence
        if (sequence.state is SequenceState.RESTING) != (("rest", sequence.id) in state.timers):
            yield sequence
    for device in state.devices.values():
        if device.killing != (("kill", device.id) in state.timers):
            yield device
    for name, node in state.nodes.items():
        if (("silent" if node.state is NodeState.UP else "drop"), name) not in state.timers:
            yield node


def _promises_are_kept(state: State) -> Iterator[object]:
    """Room is promised to sequences that wait, or run there."""
    for replica in state.replicas.values():
        for name, size in replica.promises.items():
            sequence = state.sequences.get(name)
            if sequence is None or sequence.kv_bytes != size or sequence.replica not in (None, replica):
                yield replica, name


def _trials_are_alone(state: State) -> Iterator[object]:
    """On a device that is given over to a trial nothing else runs; a suspect runs nowhere else."""
    for device in state.devices.values():
        running = [sequence for replica in device.replicas.values() for sequence in replica.running]
        if device.trial is not None and any(("sequence", sequence) != device.trial for sequence in running):
            yield device
        if any(sequence in state.suspects and device.trial != ("sequence", sequence) for sequence in running):
            yield device


def _drained_are_left(state: State) -> Iterator[object]:
    """Nothing is on a drained device, or on its way there, but what goes when its sequences have ended."""
    for device in state.devices.values():
        if device.drained != (device.id.node in state.drained):
            yield device
        for replica in device.replicas.values() if device.drained else ():
            if replica.state in PLANNED and not replica.retiring:
                yield replica


CHECKS: dict[str, Callable[[State], Iterator[object]]] = {
    "one owner": _one_owner,
    "one queue": _one_queue,
    "busy are ready": _busy_are_ready,
    "ledgers equal residencies": _ledgers_equal_residencies,
    "ledgers within budget": _ledgers_within_budget,
    "indexes agree": _indexes_agree,
    "commands have deadlines": _commands_have_deadlines,
    "promises are kept": _promises_are_kept,
    "trials are alone": _trials_are_alone,
    "drained are left": _drained_are_left,
}
