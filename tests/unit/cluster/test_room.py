"""Who leaves the device or the DRAM that a start needs, and when."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.turn import Turn
from serverless_llm.cluster.victims import hold_s
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, D1, STILL, Desk, decided, deploy, idle, kinds, node

DONE = FinishReason.STOP
OTHER = DeviceId("n1", 0)


def test_who_asked_first_is_given_the_place_though_no_prompt_is_ready() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("x", 1)
    for name in ("a", "b"):
        desk.tell(deploy(name))
    desk.tell(e.RequestArrived(2, "b", "sha-b"))
    desk.tell(e.RequestArrived(3, "a", "sha-a"), after=1.0)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert decided(desk.tell(e.Delete("x"))).model == "b"


def test_the_victim_is_the_one_idle_longest() -> None:
    desk = Desk(STILL)
    desk.join()
    first = idle(desk, "a", 1, size=30)
    desk.tick(5.0)
    idle(desk, "b", 2, size=30)
    desk.tick(5.0)
    desk.tell(deploy("x", size=40))
    out = desk.tell(e.RequestArrived(3, "x", "sha-x"))
    assert decided(out).victims == (first,)
    assert out[1:] == [c.Evicted(first, "a", D0, "memory"), c.Unload(first, D0)]
    assert desk.tell(e.Unloaded(first)) == [c.Reserve(D0, 3, 50)]


def test_the_victim_is_not_the_one_loaded_first_but_used_last() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1, size=30)
    second = idle(desk, "b", 2, size=30)
    desk.ask(3, "a")
    desk.tell(e.SequenceDone(3, 1, DONE, 3), after=5.0)
    desk.tick(5.0)
    desk.tell(deploy("x", size=40))
    assert decided(desk.tell(e.RequestArrived(4, "x", "sha-x"))).victims == (second,)


def test_one_byte_too_few_needs_a_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    a = idle(desk, "a", 1, size=30)
    desk.tick(10.0)
    desk.tell(deploy("x", size=51))
    assert decided(desk.tell(e.RequestArrived(2, "x", "sha-x"))).victims == (a,)


def test_an_idle_replica_whose_model_has_a_request_is_no_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1)
    desk.tick(100.0)
    desk.tell(e.RequestArrived(2, "a", "sha-a"))
    desk.tell(deploy("b"))
    assert desk.ask(3, "b") == []


def test_who_makes_way_for_a_request_that_is_gone_serves_again() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    desk.tick(2.0)
    assert desk.ask(3, "a") == []
    assert kinds(desk.tell(e.ClientGone(2))) == ["Dispatch"]
    assert desk.machine.state.hungry == {}
    assert ("hungry", "b") not in desk.machine.state.timers


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize(("weights", "held", "hold_s"), [("view", 80, 1.0), ("copy", 80, 5.0), ("copy", 0, 6.0)])
def test_an_idle_replica_is_held_for_as_long_as_bringing_it_back_takes(
    weights: str, held: int, hold_s: float, lent: bool
) -> None:
    desk = Desk(STILL)
    desk.join(node(weights=weights))
    known = desk.machine.state.nodes["n0"]
    there = known.lent if lent else known.resident
    there["sha-a"] = there["sha-b"] = held
    known.bandwidth.update(disk=16.0, upload=20.0)
    idle(desk, "a", 1)
    known.overhead_s = 1.0
    desk.tell(deploy("b"))
    assert desk.ask(2, "b") == []
    assert desk.tick(hold_s - 0.01) == []
    one = decided(desk.tick(0.01))
    assert (one.victims, round(one.predicted_s, 6)) == ((1,), hold_s)
    assert desk.machine.state.hungry == {}


@pytest.mark.parametrize(("away", "hold_s"), [(None, 8.0), (40, 4.0), (0, 5.0)])
def test_bringing_back_what_a_server_has_takes_its_link(away: int | None, hold_s: float) -> None:
    desk = Desk(STILL)
    desk.join()
    known = desk.machine.state.nodes["n0"]
    known.bandwidth.update(remote=10.0, disk=16.0, upload=80.0)
    idle(desk, "a", 1, remote_bytes=80)
    known.away |= {} if away is None else {"sha-a": away}
    known.overhead_s = 0.0
    desk.tell(deploy("b"))
    assert desk.ask(2, "b") == []
    assert desk.tick(hold_s - 0.01) == []
    assert decided(desk.tick(0.01)).victims == (1,)


def test_who_makes_way_has_no_room_for_its_own_requests() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1, size=30, max_replicas=2)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    desk.tick(2.0)
    assert desk.ask(3, "a") == []
    small = NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", 50, "copy"),))
    one = decided(desk.tell(e.NodeJoined(small, ((OTHER, 1),), (), ())))
    assert (one.model, one.device) == ("a", OTHER)


def test_room_that_an_operator_makes_is_given_to_who_waits() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1)
    desk.tell(deploy("b"))
    assert desk.ask(2, "b") == []
    assert kinds(desk.tell(e.UnloadModel("a"))) == ["Evicted", "Unload", "Decided"]


def test_nobody_looks_for_room_for_a_request_that_is_gone() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert ("hungry", "b") in desk.machine.state.timers
    desk.tell(e.ClientGone(2))
    assert ("hungry", "b") not in desk.machine.state.timers


def test_an_operators_wish_is_as_patient_as_a_request() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("b"))
    desk.tell(e.Load("b"))
    desk.tick(1.9)
    assert desk.machine.state.replicas[1].draining_for == ""
    desk.tick(0.1)
    assert desk.machine.state.replicas[1].draining_for == "b"


def test_what_never_leaves_is_not_looked_at_again() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1, pinned=True)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert ("hungry", "b") not in desk.machine.state.timers


def test_only_who_leaves_before_its_hold_is_over_counts_as_switched() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1)
    desk.tell(deploy("b"))
    desk.tick(100.0)
    assert decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).victims == (1,)
    desk.tell(e.Unloaded(1))
    desk.tell(e.ClientGone(2))
    desk.tell(deploy("x"))
    assert decided(desk.tell(e.RequestArrived(3, "x", "sha-x"))).victims == (2,)  # a load that nobody waits for
    assert [len(model.switches) for model in desk.machine.state.models.values()] == [0, 0, 0]


def test_a_dead_device_of_unknown_memory_says_nothing_while_another_fits() -> None:
    desk = Desk(STILL)
    mixed = NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cuda", 0, "copy")))
    desk.tell(e.NodeJoined(mixed, ((D0, 1),), (), ()))
    desk.serve("a", 1)
    for incarnation in (1, 2, 3):
        desk.tell(e.WorkerLost(D1, incarnation, "no CUDA driver"))
    desk.tell(deploy("b"))
    assert desk.ask(2, "b") == []


def test_who_is_told_that_nothing_fits_waits_for_no_room() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.tell(deploy("big", size=95))
    assert kinds(desk.tell(e.RequestArrived(1, "big", "sha-big"))) == ["Reject"]
    assert desk.machine.state.hungry == {}


def test_a_start_waits_for_all_that_leave() -> None:
    desk = Desk(STILL)
    desk.join()
    a, b = idle(desk, "a", 1, size=30), idle(desk, "b", 2, size=30)
    desk.tell(deploy("x"))
    desk.tick(1.0)
    assert decided(desk.tell(e.RequestArrived(3, "x", "sha-x"))).victims == (a, b)
    assert desk.tell(e.Unloaded(b)) == []
    assert desk.tell(e.Unloaded(a)) == [c.Reserve(D0, 3, 90)]


def test_room_that_is_being_freed_needs_no_further_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    idle(desk, "a", 1)
    desk.tell(e.UnloadModel("a"))
    desk.tell(deploy("b"))
    assert decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).victims == ()
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 2, 90)]


def test_a_busy_replica_is_no_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert desk.tick(1000.0) == []


def test_one_of_min_replicas_is_no_victim_but_a_further_one_is() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    desk.tell(deploy("a", min_replicas=1, max_replicas=2, max_concurrency=1))
    desk.bring_up(1)
    desk.ask(1, "a")
    desk.ask(2, "a")
    desk.bring_up(2, D1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    desk.tick(1.0)
    desk.tell(deploy("b"))
    assert decided(desk.ask(3, "b")).victims == (2,)
    desk.tell(deploy("x"))
    assert desk.ask(4, "x") == []


def test_scaling_out_does_not_take_a_place_in_use() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    desk.serve("a", 1)
    desk.serve("b", 2, max_replicas=2, max_concurrency=1)
    desk.ask(3, "b")
    assert desk.tick(1000.0) == []
    assert [replica.draining_for for replica in desk.machine.state.replicas.values()] == ["", ""]


def test_who_made_way_for_one_that_is_gone_may_make_way_for_another() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    for sequence, name in ((2, "b"), (3, "x")):
        desk.tell(deploy(name))
        desk.ask(sequence, name)
        desk.tick(2.0)
        assert desk.machine.state.replicas[1].draining_for == name
        desk.tell(e.ClientGone(sequence))


def test_of_those_that_run_who_is_brought_back_soonest_makes_way() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    desk.serve("b", 1, size=40)
    desk.tick(50.0)
    desk.serve("a", 2, size=30)
    desk.tell(deploy("x", size=30))
    desk.ask(3, "x")
    desk.tick(20.0)
    assert [one.model for one in desk.machine.state.replicas.values() if one.draining_for] == ["a"]


def test_a_start_under_way_is_no_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.ask(1, "a")
    assert desk.ask(2, "b") == []
    assert desk.tick(9.0) == []


def test_a_replica_that_is_about_to_leave_is_nobodys_victim() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.tell(e.UnloadModel("a"))
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert desk.tick(500.0) == []
    assert desk.machine.state.replicas[1].draining_for == ""
    assert kinds(desk.tell(e.SequenceDone(1, 1, DONE, 3))) == ["Evicted", "Unload", "Decided"]


def view(dram: int, devices: int = 2) -> NodeSpec:
    return node(devices=devices, weights="view", dram=dram)


def test_in_view_mode_the_idle_are_brought_back_from_dram() -> None:
    desk = Desk(STILL)
    desk.join(view(dram=1000))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    replica = desk.machine.state.replicas[idle(desk, "a", 1)]
    assert hold_s(Turn(desk.machine.state, STILL, 0.0), replica) == STILL.hold_floor_s


def test_in_view_mode_one_checkpoint_is_pinned_once() -> None:
    desk = Desk(STILL)
    desk.join(view(dram=80))
    desk.serve("a", 1, max_replicas=2, max_concurrency=1)
    assert kinds(desk.ask(2, "a")) == ["Decided", "Reserve"]
    assert desk.machine.state.nodes["n0"].actual_dram.used == 80


def test_in_view_mode_dram_is_freed_by_all_that_pin_a_checkpoint() -> None:
    desk = Desk(STILL)
    desk.join(view(dram=100))
    desk.tell(deploy("a", size=30, min_replicas=0, max_replicas=2, max_concurrency=1))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.ask(2, "a")
    second = desk.machine.state.replicas[2].device
    desk.bring_up(2, second)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(deploy("b", size=80))
    desk.ask(3, "b")
    assert desk.tick(1.0) == []  # one pin of `a` is in use: its bytes stay
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    out = desk.tick(1.0)
    assert sorted(decided(out).victims) == [1, 2]
    assert desk.tell(e.Unloaded(1)) == []
    assert kinds(desk.tell(e.Unloaded(2))) == ["Reserve"]


def test_in_view_mode_each_checkpoint_is_pinned_for_itself() -> None:
    desk = Desk(STILL)
    desk.join(view(dram=100))
    idle(desk, "a", 1, size=40)
    desk.serve("b", 2, size=40)
    desk.tick(10.0)
    desk.tell(deploy("x", size=50))
    assert decided(desk.ask(3, "x")).victims == (1,)


def test_in_view_mode_copies_are_no_pins() -> None:
    desk = Desk(STILL)
    views = (DeviceSpec(1, "cpu", 100, "view"), DeviceSpec(2, "cpu", 100, "view"))
    desk.join(NodeSpec("n0", 100, (DeviceSpec(0, "cpu", 75, "copy"), *views)))
    copied = idle(desk, "a", 1, size=60)
    assert desk.machine.state.replicas[copied].device == D0
    desk.tick(40.0)
    viewed = idle(desk, "b", 2, size=70)
    desk.tick(10.0)
    desk.tell(deploy("x", size=80))
    assert decided(desk.ask(3, "x")).victims == (viewed,)


def test_in_view_mode_what_leaves_the_device_frees_its_dram() -> None:
    desk = Desk(STILL)
    desk.join(view(dram=100, devices=1))
    idle(desk, "a", 1)
    desk.tell(deploy("b"))
    desk.tick(1.0)
    assert decided(desk.ask(2, "b")).victims == (1,)


def test_nodes_may_mix_views_and_copies() -> None:
    desk = Desk(STILL)
    spec = NodeSpec("n0", 80, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cpu", 100, "view")))
    desk.join(spec)
    desk.serve("a", 1, pinned=True)
    desk.serve("b", 2)
    assert desk.machine.state.nodes["n0"].actual_dram.used == 80
    desk.tell(deploy("x"))
    desk.ask(3, "x")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert decided(desk.tick(1.0)).device == D1
