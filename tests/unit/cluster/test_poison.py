"""Requests and checkpoints that end workers: charged, tried alone, convicted; whoever is beside them is served."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.transitions import SequenceState
from serverless_llm.domain import DeviceId, FinishReason
from tests.unit.cluster.desk import D0, D1, PHASES, Desk, deploy, node
from tests.unit.cluster.driver import GIB, World

DONE = FinishReason.STOP


def kinds(out: list[c.Command]) -> list[str]:
    return [type(one).__name__ for one in out]


class Court(Desk):
    """One device; its worker can die, and comes back at once."""

    def __init__(self) -> None:
        super().__init__(Policy(silent_after=1e9, mention_s=1e9))
        self.incarnation = 1
        self.join()

    def die(self) -> list[c.Command]:
        out = self.tell(e.WorkerLost(D0, self.incarnation, "SIGSEGV"))
        self.incarnation += 1
        return out + self.tell(e.WorkerUp(D0, self.incarnation))

    def reload(self) -> list[c.Command]:
        """Every start under way succeeds."""
        out: list[c.Command] = []
        for replica in sorted(self.machine.state.replicas):
            out += self.tell(e.Reserved(D0, replica))
        for replica in sorted(self.machine.state.replicas):
            out += self.tell(e.ReplicaReady(replica, PHASES))
        return out

    def progress(self, *sequences: tuple[int, int]) -> list[c.Command]:
        """(sequence, tokens) at their current epochs."""
        state = self.machine.state
        held = tuple((sequence, state.sequences[sequence].epoch, tokens, 1) for sequence, tokens in sequences)
        return self.tell(e.Progress(D0, self.incarnation, held))


def dispatched(out: list[c.Command]) -> list[int]:
    return [one.sequence for one in out if isinstance(one, c.Dispatch)]


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


class Pair(Desk):
    """Two devices, each with a replica of `a`. Sequence 1 was there when a worker died, and is on `D1` now."""

    def __init__(self) -> None:
        super().__init__(Policy(silent_after=1e9, mention_s=1e9))
        self.incarnations = {D0: 1, D1: 1}
        self.join(node(devices=2))
        self.tell(deploy("a", size=30, min_replicas=2, max_replicas=2))
        self.bring_up(1, D0)
        self.bring_up(2, D1)
        self.ask(1, "a")
        self.die(D0)
        self.back(D0)

    def die(self, device: DeviceId) -> list[c.Command]:
        return self.tell(e.WorkerLost(device, self.incarnations[device], "SIGSEGV"))

    def back(self, device: DeviceId) -> list[c.Command]:
        """A new worker, and all that starts there."""
        self.incarnations[device] += 1
        out = self.tell(e.WorkerUp(device, self.incarnations[device]))
        for replica in sorted(self.machine.state.devices[device].replicas):
            out += self.bring_up(replica, device)
        return out


def test_a_suspect_that_awaits_its_trial_on_one_device_takes_no_other() -> None:
    pair = Pair()
    assert dispatched(pair.ask(2, "a")) == [2]
    assert c.Cancel(D0, 2, 1) in pair.die(D1)
    devices = pair.machine.state.devices
    assert devices[D0].trial == ("sequence", 1)
    assert dispatched(pair.back(D1)) == [2]
    assert devices[D1].trial is None


def test_a_suspect_is_tried_on_the_first_of_the_devices_that_can() -> None:
    desk = Desk(Policy(silent_after=1e9, mention_s=1e9))
    desk.join(node(devices=3))
    desk.tell(deploy("a", size=30, min_replicas=3, max_replicas=3))
    for replica, device in enumerate((D0, D1, DeviceId("n0", 2)), start=1):
        desk.bring_up(replica, device)
    desk.ask(1, "a")
    desk.tell(e.WorkerLost(D0, 1, "SIGSEGV"))
    desk.tell(e.WorkerUp(D0, 2))
    desk.bring_up(4, D0)  # the newest replica, on the first device
    assert dispatched(desk.tell(e.WorkerLost(D1, 1, "SIGSEGV"))) == [1]
    assert desk.machine.state.devices[D0].trial == ("sequence", 1)


def test_who_was_taken_back_and_runs_elsewhere_is_charged_but_no_suspect_when_its_former_worker_dies() -> None:
    pair = Pair()
    pair.ask(2, "a")
    pair.die(D1)
    pair.machine.state.sequences[2].deaths = 1
    assert dispatched(pair.back(D1)) == [2]
    pair.die(D0)
    assert pair.machine.state.sequences[2].deaths == 2
    assert list(pair.machine.state.suspects) == [1]


def test_a_suspect_is_not_brought_before_a_worker_that_is_to_die() -> None:
    pair = Pair()
    pair.ask(2, "a")
    pair.tell(deploy("b", size=30))
    pair.ask(3, "b")
    assert pair.tick(30.0) == [c.KillWorker(D0, 2)]
    pair.tell(e.Progress(D1, 1, ((1, 2, 3, 1),)))
    assert "Cancel" not in kinds(pair.die(D1))
    assert list(pair.machine.state.suspects) == [1]


def test_a_load_and_a_suspect_are_tried_side_by_side() -> None:
    pair = Pair()
    pair.tell(deploy("b", size=30))
    pair.machine.state.models["b"].load_deaths = 2
    assert kinds(pair.ask(2, "b"))[0] == "Decided"
    load = pair.machine.state.devices[D0].trial
    assert load is not None
    assert load[0] == "load"
    pair.die(D1)
    pair.back(D1)
    assert pair.machine.state.devices[D0].trial == load
    assert pair.machine.state.devices[D1].trial == ("sequence", 1)


def test_a_deleted_models_suspects_are_told() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    court.reload()
    court.die()
    court.reload()
    court.tell(e.Delete("a"))
    assert kinds(court.die()) == ["Reject"]
    assert court.machine.state.suspects == {}


def test_a_load_that_ends_three_workers_is_guilty_and_cools_down_for_long() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.tell(deploy("bad", size=30))
    court.ask(1, "a")
    court.reload()
    court.ask(2, "bad")
    for _ in range(2):
        court.tell(e.Reserved(D0, max(court.machine.state.replicas)))
        court.die()
    assert court.machine.state.models["bad"].load_deaths == 2
    assert [one.model for one in court.machine.state.replicas.values()] == ["a"]  # alone means: not beside a load
    out = court.reload()
    assert dispatched(out) == [1]
    assert c.Cancel(D0, 1, 2) in out  # the trial of the load begins: nothing runs beside it
    court.progress()
    court.tell(e.Reserved(D0, max(court.machine.state.replicas)))
    assert court.ask(3, "a") == []
    reject = court.die()[0]
    message = "loading bad ended the engine process 3 times"
    assert reject == c.Reject(2, 503, "model_load_failed", message, 60.0, True)
    assert dispatched(court.reload()) == [1, 3]
    assert court.tell(e.RequestArrived(4, "bad", "sha-bad"), after=30.0) == [
        c.Reject(4, 503, "model_load_failed", message, 30.0, True)
    ]
    assert court.machine.state.models["bad"].error == message
    court.tick(30.0)
    court.ask(5, "bad")
    court.progress()
    court.tell(e.Reserved(D0, max(court.machine.state.replicas)))
    again = "loading bad ended the engine process 4 times"
    assert court.die()[0] == c.Reject(5, 503, "model_load_failed", again, 120.0, True)


def test_a_load_that_succeeds_alone_is_innocent() -> None:
    court = Court()
    court.tell(deploy("a", size=30))
    court.ask(1, "a")
    for _ in range(2):
        court.tell(e.Reserved(D0, max(court.machine.state.replicas)))
        court.die()
    assert court.machine.state.devices[D0].trial == ("load", 3)
    court.tick(3.0)
    court.tell(e.Reserved(D0, 3))
    for step in range(1, 20):
        court.tell(e.LoadProgress(3, step, 30), after=5.0)  # longer than a sequence's trial may last
    assert court.machine.state.devices[D0].trial == ("load", 3)
    assert dispatched(court.tell(e.ReplicaReady(3, PHASES))) == [1]
    assert court.machine.state.models["a"].load_deaths == 0
    assert court.machine.state.devices[D0].trial is None


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("after", [0.0, 0.1, 1.0, 5.0, 30.0])
def test_a_request_that_always_kills_costs_three_workers_and_no_healthy_stream(devices: int, after: float) -> None:
    """Whatever it generates before it does."""
    world = World(seed=round(10 * after))
    world.add_node(devices=devices, budget=GIB)
    world.deploy("a", max_replicas=2, context=16384)
    world.deploy("b", size=100 << 20)
    healthy = [world.request(name, tokens=400) for name in "aaaaaaab"]
    world.run(1.0)
    poison = world.request("a", tokens=10_000)
    world.poison[poison] = after
    world.run(0.1)
    healthy += [world.request(name, tokens=40) for name in "aabb"]
    world.run_until_answered(600.0)
    assert world.deaths == 3
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert world.clients[poison].end == "500 engine_error"


def test_a_checkpoint_that_always_kills_costs_three_workers_and_no_healthy_stream() -> None:
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a")
    world.deploy("bad", size=100 << 20)
    world.poison_models.add("bad")
    healthy = [world.request("a", tokens=400) for _ in range(8)]
    world.run(1.0)
    asked = [world.request("bad") for _ in range(3)]
    world.run_until_answered(60.0)
    assert world.deaths == 3
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert {world.clients[sequence].end for sequence in asked} == {"503 model_load_failed"}
    assert world.machine.state.models["bad"].error == "loading bad ended the engine process 3 times"
    assert {world.clients[world.request("a")].end for _ in range(3)} == {""}
    world.run_until_answered(5.0)


def test_a_poisonous_request_and_checkpoint_at_once() -> None:
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a")
    world.deploy("bad", size=100 << 20)
    world.poison_models.add("bad")
    healthy = [world.request("a", tokens=300) for _ in range(4)]
    world.run(1.0)
    world.poison[world.request("a")] = 0.0
    world.request("bad")
    world.run_until_answered(60.0)
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert world.deaths <= 6
