"""Two devices with suspects, and checkpoints that end workers."""

from __future__ import annotations

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceId
from tests.unit.cluster.court import Court, Pair, dispatched
from tests.unit.cluster.desk import D0, D1, PHASES, STILL, Desk, deploy, kinds, node


def test_a_suspect_that_awaits_its_trial_on_one_device_takes_no_other() -> None:
    pair = Pair()
    assert dispatched(pair.ask(2, "a")) == [2]
    assert c.Cancel(D0, 2, 1) in pair.die(D1)
    devices = pair.machine.state.devices
    assert devices[D0].trial == ("sequence", 1)
    assert dispatched(pair.back(D1)) == [2]
    assert devices[D1].trial is None


def test_a_suspect_is_tried_on_the_first_of_the_devices_that_can() -> None:
    desk = Desk(STILL)
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
    pair.tick(0.5)
    pair.die(D0)
    assert pair.machine.state.sequences[2].deaths == 2
    assert pair.machine.state.sequences[2].longest_charged == 0.0
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
    assert (court.machine.state.models["a"].load_deaths, court.machine.state.models["a"].error) == (0, "")
    assert court.machine.state.devices[D0].trial is None
