"""Who ends workers: a crash is charged to all that was there, and those charged twice are tried alone.

A sequence that runs, or a model that loads, when its worker dies is charged. Two charges make a suspect. A trial gives
a suspect a device of its own: what runs there goes back to its queue, nothing else is dispatched or started until the
trial ends. A worker that dies in a trial convicts. A sequence is acquitted when it has run alone for `trial_factor`
times as long as the longest run that a death ended, and moved on: tokens alone prove nothing, for one that always kills
may generate some before it does. So a sequence or a checkpoint that kills every time ends three workers, or a few more
if each life is `trial_factor` times as long as all before it. The first charge after an acquittal makes a suspect
again; `trial_s` of life clear all charges. A worker that was told to die, or went with its node or its node's
forkserver, charges nobody: that says nothing of what ran there.
"""

from __future__ import annotations

from serverless_llm.cluster.failures import convict
from serverless_llm.cluster.sequences import accuse, dispatch, end_trial, recall, reject, suspect
from serverless_llm.cluster.state import STARTING, Device, Replica, Sequence
from serverless_llm.cluster.transitions import ReplicaState, SequenceState
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import DeviceId


def charge(turn: Turn, device: Device, cause: str) -> None:
    """The worker of `device` died, by itself, with its sequences and loads; who is guilty, or a suspect, leaves it."""
    sequences = {s.id: s for replica in device.replicas.values() for s in replica.running.values()}
    recalled = sorted(device.recalled & (turn.state.sequences.keys() - sequences.keys()))
    loads = [replica for replica in device.replicas.values() if replica.state is ReplicaState.LOADING]
    for sequence in sequences.values():
        _charge_sequence(turn, sequence, cause)
    for sequence_id in recalled:
        _charge_recalled(turn, turn.state.sequences[sequence_id])
    for replica in loads:
        _charge_load(turn, replica, device.trial)


def try_suspects(turn: Turn) -> None:
    """End the trials that are over, begin those that can begin."""
    if not turn.state.suspects:
        return
    on_trial = [d for d in turn.state.devices.values() if d.trial is not None and d.trial[0] == "sequence"]
    for device in on_trial:
        _try(turn, device)
    tried = {d.trial[1] for d in on_trial if d.trial is not None}
    for sequence in sorted(turn.state.suspects.values(), key=lambda s: s.order):
        if sequence.state is SequenceState.SUSPECT and sequence.id not in tried:
            _begin(turn, sequence)


def isolate(turn: Turn, device: Device, trial: tuple[str, int]) -> None:
    """The device belongs to `trial`; what ran there goes on later, or elsewhere."""
    device.trial, device.isolated_at = trial, turn.now
    turn.arm("trial", device.id, turn.policy.trial_s)
    for replica in list(device.replicas.values()):
        for sequence in list(replica.running.values()):
            recall(turn, sequence)


def outlived(turn: Turn, device_id: DeviceId) -> None:
    """The term of a trial is over: acquit, or wait for progress. One that could not begin makes way."""
    device = turn.device(device_id)
    if device.trial is None:  # others had their turn
        turn.room = True
        return
    if device.trial[0] == "load":  # loads have deadlines of their own
        return
    sequence = turn.state.suspects[device.trial[1]]
    if sequence.replica is None:
        end_trial(turn, device, device.trial)
        return
    left = turn.policy.trial_s - (turn.now - sequence.dispatched)
    if left > 0 and sequence.generated < sequence.resumed_at + turn.policy.progress_tokens:
        turn.arm("trial", device_id, min(left, _term(turn, sequence)))
        return
    del turn.state.suspects[sequence.id]
    sequence.deaths = turn.policy.suspect_deaths - 1
    end_trial(turn, device, device.trial)


def _charge_sequence(turn: Turn, sequence: Sequence, cause: str) -> None:
    ran = turn.now - sequence.dispatched
    sequence.longest_charged = max(sequence.longest_charged, ran)
    if ran >= turn.policy.trial_s:  # also of one on trial, should the death be told before its term is noticed
        turn.state.suspects.pop(sequence.id, None)
        sequence.deaths = 0
    sequence.deaths += 1
    if sequence.id in turn.state.suspects:  # and so on trial
        message = f"the request ended the engine process {sequence.deaths} times; last: {cause}"
        reject(turn, sequence, 500, "engine_error", message, None, retry=False)
    elif sequence.deaths >= turn.policy.suspect_deaths:
        suspect(turn, sequence)


def _charge_recalled(turn: Turn, sequence: Sequence) -> None:
    """It was taken back, but its worker may have died of it before it knew."""
    sequence.deaths += 1
    if sequence.replica is None:  # else it runs elsewhere by now
        sequence.longest_charged = max(sequence.longest_charged, turn.now - sequence.dispatched)
    if sequence.deaths >= turn.policy.suspect_deaths and sequence.state is SequenceState.WAITING:
        accuse(turn, sequence)


def _term(turn: Turn, sequence: Sequence) -> float:
    """Seconds that a sequence must run alone for."""
    policy = turn.policy
    return min(policy.trial_s, max(policy.trial_floor_s, policy.trial_factor * sequence.longest_charged))


def _charge_load(turn: Turn, replica: Replica, trial: tuple[str, int] | None) -> None:
    model = turn.state.models[replica.model]
    model.load_deaths += 1
    if trial == ("load", replica.id):
        convict(turn, model, model.load_deaths)


def _try(turn: Turn, device: Device) -> None:
    """Dispatch a suspect whose device has become quiet; free a device that is no use."""
    assert device.trial is not None
    sequence = turn.state.suspects[device.trial[1]]
    if sequence.replica is not None:
        return
    if not device.usable or (replica := _court(turn, device, sequence)) is None:
        end_trial(turn, device, device.trial)
    elif _quiet(device):
        dispatch(turn, sequence, replica)
        turn.arm("trial", device.id, _term(turn, sequence))


def _begin(turn: Turn, sequence: Sequence) -> None:
    model = turn.state.models[sequence.model]
    courts = [turn.device(replica.device) for replica in model.ready()]
    courts = [device for device in courts if device.trial is None and device.usable]
    courts = [device for device in courts if device.court_at <= turn.now or not _wanted(turn, device)]
    if courts:
        device = min(courts, key=lambda court: court.id)
        isolate(turn, device, ("sequence", sequence.id))
        _try(turn, device)


def _court(turn: Turn, device: Device, sequence: Sequence) -> Replica | None:
    """The replica on `device` that can serve the suspect."""
    ready = turn.state.models[sequence.model].ready()
    return next((replica for replica in ready if replica.device == device.id), None)


def _quiet(device: Device) -> bool:
    """Whether nothing loads there, and the worker is in no step with those that were taken back from it."""
    return not device.recalled and not any(replica.state in STARTING for replica in device.replicas.values())


def _wanted(turn: Turn, device: Device) -> bool:
    """Whether anybody else runs or loads there, or waits."""
    used = any(replica.running or replica.state in STARTING for replica in device.replicas.values())
    return used or any(model.waiting for model in turn.state.models.values())
