"""Requests that end workers: charged, tried alone, convicted; whoever is beside them is served."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.transitions import SequenceState
from serverless_llm.domain import FinishReason
from tests.unit.cluster.court import Court, dispatched
from tests.unit.cluster.desk import D0, PHASES, deploy, kinds

DONE = FinishReason.STOP


@pytest.fixture
def court() -> Court:
    """Sequences 1, 2 and 3 of `a` were there when two workers died; the model is loaded again."""
    court = Court()
    court.tell(deploy("a", size=30))
    for sequence in (1, 2, 3):
        court.ask(sequence, "a")
    court.reload()
    court.die()
    assert dispatched(court.reload()) == [1, 2, 3]
    court.die()
    return court


def test_one_death_makes_nobody_a_suspect() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.reload()
    court.die()
    assert court.machine.state.suspects == {}


def test_progress_between_two_deaths_does_not_acquit() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.reload()
    for tokens in (100, 200):
        court.progress((1, tokens))
        court.die()
        court.reload()
    court.progress((1, 300))
    assert kinds(court.die())[0] == "Reject"


def test_a_minute_of_life_clears_all_charges() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.reload()
    for _ in range(3):
        court.tick(60.0)
        court.die()
        court.reload()
    assert court.machine.state.sequences[1].deaths == 1


def test_suspects_are_tried_one_at_a_time_in_order_of_arrival(court: Court) -> None:
    assert dispatched(court.reload()) == [1]
    assert court.ask(4, "a") == []  # the device belongs to the trial
    assert court.progress((1, 3)) == []
    assert dispatched(court.tick(1.0)) == [4]  # acquitted: the device is everybody's for as long as that took
    assert court.tick(1.0) == [c.Cancel(D0, 1, 3), c.Cancel(D0, 4, 1)]
    assert dispatched(court.progress((4, 1))) == []  # the worker may still be in a step with it
    assert dispatched(court.progress()) == [2]
    out = court.tell(e.SequenceDone(2, 3, DONE, 9))
    assert dispatched(out) == [3]
    court.progress((3, 3))
    assert dispatched(court.tick(1.0)) == [1, 4]
    assert court.machine.state.devices[D0].trial is None


def test_a_trial_lasts_four_times_as_long_as_the_longest_life_that_a_death_ended() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.reload()
    for life in (3.0, 2.0):
        court.tick(life)
        court.die()
        court.reload()
    court.progress((1, 9))
    court.tick(11.9)
    assert list(court.machine.state.suspects) == [1]
    court.tick(0.2)
    assert court.machine.state.suspects == {}


def test_the_first_charge_after_an_acquittal_makes_a_suspect_again(court: Court) -> None:
    court.reload()
    court.tell(e.ClientGone(2))
    court.tell(e.ClientGone(3))
    court.progress((1, 3))
    court.tick(1.0)
    assert court.machine.state.suspects == {}
    court.die()
    assert list(court.machine.state.suspects) == [1]


def test_a_suspect_that_ends_its_worker_alone_is_guilty(court: Court) -> None:
    court.reload()
    out = court.die()
    assert out[0] == c.Reject(
        1, 500, "engine_error", "the request ended the engine process 3 times; last: SIGSEGV", None, False
    )
    assert dispatched(court.reload()) == [2]
    assert court.machine.state.sequences[3].deaths == 2


def test_without_progress_a_trial_goes_on_for_a_minute(court: Court) -> None:
    court.reload()
    court.tell(e.Resumed(1, 3, 40))  # tokens of the runs before
    court.progress((1, 41))  # from its prefill
    for _ in range(58):
        court.tick(1.0)
    assert list(court.machine.state.suspects) == [1, 2, 3]
    court.tick(1.9)
    assert list(court.machine.state.suspects) == [1, 2, 3]
    court.tick(0.1)
    assert list(court.machine.state.suspects) == [2, 3]


def test_a_death_after_a_full_trial_convicts_nobody(court: Court) -> None:
    court.reload()
    court.tell(e.WorkerLost(D0, court.incarnation, "SIGSEGV"), after=60.0)
    assert court.machine.state.sequences[1].deaths == 1
    assert list(court.machine.state.suspects) == [2, 3]


def test_what_is_resumed_in_an_epoch_that_is_over_counts_for_nothing(court: Court) -> None:
    court.reload()
    court.tell(e.Resumed(1, 2, 40))
    court.progress((1, 3))
    court.tick(1.0)
    assert list(court.machine.state.suspects) == [2, 3]


def test_a_client_that_leaves_ends_the_trial(court: Court) -> None:
    court.reload()
    assert dispatched(court.tell(e.ClientGone(1))) == []
    assert dispatched(court.progress()) == [2]
    assert dispatched(court.tell(e.ClientGone(3))) == []
    assert dispatched(court.tell(e.ClientGone(2))) == []
    assert court.machine.state.devices[D0].trial is None


def test_a_trial_waits_for_loads_to_end_and_holds_new_ones_up(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.ask(4, "b")
    court.tell(deploy("x", size=10))
    replica_a, replica_b = sorted(court.machine.state.replicas)
    court.tell(e.Reserved(D0, replica_a))
    court.tell(e.Reserved(D0, replica_b))
    assert dispatched(court.tell(e.ReplicaReady(replica_a, PHASES))) == []
    assert court.ask(5, "x") == []
    assert dispatched(court.tell(e.ReplicaReady(replica_b, PHASES))) == [1]
    for sequence in (1, 2):
        court.tell(e.ClientGone(sequence))
    out = court.tell(e.ClientGone(3))
    assert dispatched(out) == [4]
    assert kinds(out)[-2:] == ["Decided", "Reserve"]


def test_an_armed_trial_ends_with_its_client(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.ask(4, "b")
    replica_a = min(court.machine.state.replicas)
    court.tell(e.Reserved(D0, replica_a))
    court.tell(e.ReplicaReady(replica_a, PHASES))
    assert court.machine.state.devices[D0].trial == ("sequence", 1)
    for sequence in (1, 2, 3):
        court.tell(e.ClientGone(sequence))
    assert court.machine.state.devices[D0].trial is None


def test_a_trials_term_ends_with_its_node(court: Court) -> None:
    court.reload()
    assert ("trial", D0) in court.machine.state.timers
    court.tell(e.NodeLost("n0"))
    assert ("trial", D0) not in court.machine.state.timers


def test_an_armed_trial_ends_with_its_replica(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.ask(4, "b")
    replica_a = min(court.machine.state.replicas)
    court.tell(e.Reserved(D0, replica_a))
    court.tell(e.ReplicaReady(replica_a, PHASES))
    out = court.tell(e.UnloadModel("a"))
    assert court.machine.state.devices[D0].trial is None
    assert kinds(out) == ["Evicted", "Unload", "Decided"]


def test_a_trial_that_cannot_begin_makes_way(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.ask(4, "b")
    replica_a, replica_b = sorted(court.machine.state.replicas)
    court.tell(e.Reserved(D0, replica_a))
    court.tell(e.Reserved(D0, replica_b))
    court.tell(e.ReplicaReady(replica_a, PHASES))
    for step in range(1, 10):
        court.tell(e.LoadProgress(replica_b, step, 30), after=7.0)
    assert court.machine.state.sequences[1].state is SequenceState.SUSPECT
    assert dispatched(court.ask(5, "a")) == [5]
    for step in range(10, 19):
        court.tell(e.LoadProgress(replica_b, step, 30), after=7.0)
    assert court.machine.state.sequences[5].state is SequenceState.WAITING  # the trial waits for the load once more
    for step in range(19, 28):
        court.tell(e.LoadProgress(replica_b, step, 30), after=7.0)
    assert court.machine.state.sequences[5].replica is not None
    assert dispatched(court.tell(e.ReplicaReady(replica_b, PHASES))) == [4]
    assert dispatched(court.tick(63.0)) == []
    assert dispatched(court.progress()) == [1]


def test_no_trial_begins_on_a_worker_that_was_told_to_die(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.ask(4, "b")
    replica_a, _ = sorted(court.machine.state.replicas)
    court.tell(e.Reserved(D0, replica_a))
    court.tell(e.ReplicaReady(replica_a, PHASES))
    assert "KillWorker" in kinds(court.tick(30.0))  # it did not answer Reserve
    assert dispatched(court.tell(e.Delete("b"))) == []
    court.die()
    assert dispatched(court.reload()) == [1]


def recalled_for_a_trial(court: Court) -> None:
    """The device goes from 4, and 1 that was acquitted, to the trial of 2."""
    court.reload()
    court.ask(4, "a")
    court.progress((1, 3))
    court.tick(1.0)
    court.tick(1.0)
    assert court.machine.state.devices[D0].trial == ("sequence", 2)


def test_a_death_before_the_worker_let_go_of_others_is_theirs_and_not_the_suspects(court: Court) -> None:
    recalled_for_a_trial(court)
    assert "Reject" not in kinds(court.die())
    assert court.machine.state.devices[D0].recalled == set()
    sequences = court.machine.state.sequences
    assert [sequences[number].deaths for number in (1, 2, 3, 4)] == [2, 2, 2, 1]
    assert sorted(court.machine.state.suspects) == [1, 2, 3]
    assert sequences[1].state is SequenceState.SUSPECT
    assert sequences[4].longest_charged == 1.0  # its trial, should it come to one, lasts for four


def test_a_death_that_is_not_its_own_charges_nobody(court: Court) -> None:
    """Neither who is on trial nor who stands beside: its forkserver died, and its neighbours' workers with it."""
    court.reload()
    out = court.tell(e.WorkerLost(D0, court.incarnation, "the forkserver died", charged=False))
    assert "Reject" not in kinds(out)
    sequences = court.machine.state.sequences
    assert [sequences[number].deaths for number in (1, 2, 3)] == [2, 2, 2]
    assert list(court.machine.state.suspects) == [1, 2, 3]
    court.incarnation += 1
    court.tell(e.WorkerUp(D0, court.incarnation))
    assert dispatched(court.reload()) == [1]
    assert kinds(court.die())[0] == "Reject"  # this one was


def test_a_load_is_not_charged_with_a_death_that_is_not_its_own() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.tell(e.Reserved(D0, max(court.machine.state.replicas)))
    court.tell(e.WorkerLost(D0, 1, "the forkserver died", charged=False))
    assert court.machine.state.models["a"].load_deaths == 0


def test_a_worker_that_was_told_to_die_in_a_trial_convicts_nobody(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.tell(e.Load("b"))
    assert dispatched(court.reload()) == [1]
    assert "Unload" in kinds(court.tell(e.UnloadModel("b")))
    assert "KillWorker" in kinds(court.tick(30.0))  # it did not answer
    assert "Reject" not in kinds(court.die())
    assert court.machine.state.sequences[1].deaths == 2
    assert list(court.machine.state.suspects) == [1, 2, 3]


def test_a_client_that_hangs_up_in_a_step_convicts_nobody_else(court: Court) -> None:
    court.reload()
    court.tell(e.ClientGone(1))
    assert court.machine.state.devices[D0].trial == ("sequence", 2)
    assert "Reject" not in kinds(court.die())
    assert court.machine.state.sequences[2].deaths == 2


def test_a_worker_that_dies_before_a_load_began_convicts_no_model(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.reload()
    for sequence in (1, 2, 3):
        court.tell(e.ClientGone(sequence))
    court.ask(4, "b")
    court.die()
    assert court.machine.state.models["b"].load_deaths == 0


def test_a_suspect_that_is_refused_is_still_one(court: Court) -> None:
    court.reload()
    for sequence in (2, 3):
        court.tell(e.ClientGone(sequence))
    court.tell(e.SequenceRefused(1, 3, "no room"))
    assert dispatched(court.tick(0.1)) == [1]
    assert court.machine.state.devices[D0].trial == ("sequence", 1)
    assert kinds(court.die())[0] == "Reject"


def test_a_trial_of_a_minute_acquits(court: Court) -> None:
    court.reload()
    court.tick(60.0)
    assert 1 not in court.machine.state.suspects


def test_a_suspect_that_is_taken_back_is_still_one(court: Court) -> None:
    court.reload()
    court.tell(e.Progress(D0, court.incarnation, ()))
    court.tell(e.Progress(D0, court.incarnation, ()), after=10.0)
    assert dispatched(court.progress()) == [1]
    assert 1 in court.machine.state.suspects


def test_a_trial_without_progress_is_as_long_however_late_it_is() -> None:
    court = Court()
    court.tick(100.0)
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    for _ in range(2):
        court.reload()
        court.die()
    court.reload()
    court.tick(2.0)
    assert list(court.machine.state.suspects) == [1]


def test_who_was_acquitted_is_left_alone_for_as_long_as_its_trial_took(court: Court) -> None:
    court.reload()
    court.progress((1, 3))
    assert court.tick(1.0) == []
    assert court.tick(1.0) == [c.Cancel(D0, 1, 3)]


def test_between_two_trials_who_waits_is_let_in(court: Court) -> None:
    court.reload()
    court.tell(deploy("b", size=10))
    assert court.ask(4, "b") == []
    assert kinds(court.tell(e.ClientGone(1), after=0.5))[-2:] == ["Decided", "Reserve"]


def test_a_device_is_everybodys_once_a_trial_is_over(court: Court) -> None:
    court.reload()
    court.tell(deploy("b", size=10))
    assert court.tell(e.Load("b")) == []
    court.progress((1, 3))
    assert kinds(court.tick(1.0)) == ["Decided", "Reserve"]


def test_a_load_that_a_trial_made_way_for_is_not_held_up_by_the_next(court: Court) -> None:
    court.tell(deploy("b", size=30))
    court.tell(e.Load("b"))
    replica_a, replica_b = sorted(court.machine.state.replicas)
    for replica in (replica_a, replica_b):
        court.tell(e.Reserved(D0, replica))
    court.tell(e.ReplicaReady(replica_a, PHASES))
    for step in range(1, 10):
        court.tell(e.LoadProgress(replica_b, step, 30), after=7.0)
    assert court.machine.state.devices[D0].trial is None
