"""Room for the KV of sequences that a worker gave back: who leaves for it, who waits, and where replicas go."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, D1, STILL, Desk, beside, crowd, decided, deploy, idle, kinds

DONE = FinishReason.STOP


def two_devices() -> Desk:
    """`a` serves sequence 1 on the smaller device."""
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cpu", 200, "copy"))))
    return desk


def test_idle_models_leave_for_the_kv_of_what_runs() -> None:
    desk = beside()
    desk.ask(2, "a")
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=40)) == [
        c.Evicted(1, "idle", D0, "memory"),
        c.Unload(1, D0),
    ]
    assert desk.tell(e.SequenceRefused(2, 1, "no room", missing=40)) == []
    assert desk.machine.state.devices[D0].planned.free == 0
    assert desk.machine.state.hungry == {}
    assert desk.tell(e.Unloaded(1)) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch", "Dispatch"]


def test_no_more_models_leave_than_have_to() -> None:
    desk = beside()
    idle(desk, "other", 8, size=10)
    desk.tick(5.0)
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=5))) == ["Evicted", "Unload"]


@pytest.mark.parametrize("spec", [{"min_replicas": 1}, {"pinned": True}], ids=str)
def test_what_would_have_to_take_what_may_not_leave_is_told(spec: dict[str, object]) -> None:
    assert beside(**spec).tell(e.SequenceRefused(1, 1, "no room", missing=30)) == [
        c.Reject(
            1, 400, "context_length_exceeded",
            "its KV takes 60 B, which no device has beside the weights and the models that may not leave (pinned, "
            "min_replicas): ask for fewer tokens, or serve with more --device-memory", None, False,
        )
    ]  # fmt: skip


def test_nobody_is_told_while_every_device_is_drained() -> None:
    desk = beside(pinned=True)
    desk.tell(e.Drain("n0", True))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=90))) == ["Evicted", "Unload"]


def test_what_is_busy_leaves_after_its_patience_and_takes_nothing_new() -> None:
    desk = beside()
    desk.ask(2, "idle")
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))) == []
    assert kinds(desk.tick(60.0)) == []
    desk.ask(3, "idle")
    assert kinds(desk.tell(e.SequenceDone(2, 1, DONE, 3))) == ["Evicted", "Unload"]
    assert desk.tell(e.Unloaded(1)) == [c.Dispatch(1, 2, 2, D0, 60.0, None)]


def test_who_was_just_idle_keeps_its_place_for_its_hold() -> None:
    desk = beside()
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == []
    assert desk.tick(0.2) == []
    assert kinds(desk.tick(0.1)) == ["Evicted", "Unload"]


def test_who_waits_for_room_lets_others_pass() -> None:
    desk = beside()
    desk.ask(2, "idle")
    desk.ask(4, "a")
    for sequence in (1, 4):
        desk.tell(e.SequenceRefused(sequence, 1, "no room", missing=30))
    assert desk.tick(1.0) == []
    assert desk.ask(3, "a") == [c.Dispatch(3, 1, 2, D0, 0.0, None)]


def test_who_waits_for_room_may_leave() -> None:
    desk = beside()
    desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))
    desk.tell(e.ClientGone(1))
    assert desk.machine.state.devices[D0].planned.free == 60
    assert desk.tell(e.Unloaded(1)) == []


def test_room_that_was_made_is_nobody_elses_until_it_is_done() -> None:
    desk = beside()
    desk.tell(deploy("other", size=40))
    desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))
    assert kinds(desk.ask(2, "other")) == []
    assert kinds(desk.tell(e.Unloaded(1))) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]
    assert kinds(desk.tell(e.SequenceDone(1, 2, DONE, 3))) == ["Decided", "Reserve"]


def test_several_need_the_room_of_one() -> None:
    """They give way to each other there."""
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 150, "copy"),)))
    for name, size in (("idle", 30), ("x", 1), ("y", 1)):
        idle(desk, name, ord(name[0]), size=size)
    desk.tick(60.0)
    desk.serve("a", 1, size=30)
    for sequence in (2, 3):
        desk.ask(sequence, "a")
    out = [one for sequence in (1, 2, 3) for one in desk.tell(e.SequenceRefused(sequence, 1, "no room", missing=30))]
    assert kinds(out) == ["Evicted", "Unload"]
    assert kinds(desk.tell(e.Unloaded(1))) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"] * 3


def test_two_that_lack_each_others_room_go_by_age() -> None:
    desk = beside()
    desk.tick(1.0)
    desk.ask(2, "idle")
    assert desk.tell(e.SequenceRefused(2, 1, "no room", missing=30)) == []
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == []
    assert desk.tick(0.3) == [c.Evicted(1, "idle", D0, "memory"), c.Unload(1, D0)]
    assert [type(one) for one in desk.tell(e.Unloaded(1))] == [c.Dispatch]
    assert kinds(desk.tick(10.0)) == []
    assert kinds(desk.tell(e.SequenceDone(1, 2, DONE, 3))) == ["Decided", "Evicted", "Unload", "Reserve"]
    assert kinds(desk.tell(e.Unloaded(2))) == []
    assert [type(one) for one in desk.bring_up(3)][-1] is c.Dispatch


def test_a_start_reckons_with_the_room_of_those_that_wait_for_it() -> None:
    desk = beside()
    desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.tick(1.0)
    desk.ask(2, "idle")
    assert decided(desk.tell(e.WorkerUp(D0, 2))).model == "a"
    assert desk.machine.state.devices[D0].planned.free == 10


def test_who_is_in_steady_use_gives_its_place_to_what_came_long_ago() -> None:
    desk = beside()
    desk.tick(60.0)
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))) == ["Evicted", "Unload"]


def test_what_fits_a_larger_device_only_goes_there() -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 50, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cpu", 200, "copy"))))
    desk.serve("a", 1)
    assert desk.machine.state.replicas[1].device == D0
    out = desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))
    assert decided(out).device == D1
    assert c.Evicted(1, "a", D0, "memory") in out
    assert desk.machine.state.devices[D1].planned.free == 200 - 80 - 50
    assert desk.machine.state.hungry == {}
    assert [type(one) for one in desk.bring_up(2, D1)] == [c.Outcome]
    assert kinds(desk.tick(0.1)) == ["Dispatch"]


def test_what_moves_to_a_larger_device_ends_what_it_runs_where_it_was() -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cpu", 200, "copy"))))
    idle(desk, "large", 9, size=170)
    desk.tick(60.0)
    desk.serve("a", 1)
    desk.ask(2, "a")
    desk.ask(3, "large")
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))) == []
    assert kinds(desk.tick(60.0)) == []
    assert decided(desk.tell(e.SequenceDone(3, 1, DONE, 3))).device == D1
    assert kinds(desk.tell(e.SequenceDone(2, 1, DONE, 3))) == ["Evicted", "Unload"]


def test_nothing_moves_before_there_is_room_where_it_goes() -> None:
    """Whom it serves meanwhile waits for nothing."""
    desk = two_devices()
    idle(desk, "large", 9, size=170)
    desk.ask(3, "large")
    desk.serve("a", 1)
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))) == []
    assert kinds(desk.ask(2, "a")) == ["Dispatch"]
    desk.tick(60.0)
    assert kinds(desk.ask(4, "large")) == []
    assert kinds(desk.tell(e.SequenceDone(3, 1, DONE, 3))) == ["Decided", "Evicted", "Unload"]
    assert kinds(desk.tell(e.Unloaded(1))) == ["Reserve"]
    assert kinds(desk.bring_up(3, D1)) == ["Outcome", "Dispatch"]
    assert desk.tell(e.SequenceDone(2, 1, DONE, 3))[0] == c.Evicted(2, "a", D0, "memory")


def test_another_replica_starts_on_the_larger_device_where_there_may_be_two() -> None:
    desk = two_devices()
    desk.serve("a", 1, max_replicas=2)
    out = desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))
    assert decided(out).device == D1
    assert "Evicted" not in kinds(out)


@pytest.mark.parametrize("spec", [{"min_replicas": 1}, {"pinned": True}], ids=str)
def test_what_may_not_leave_does_not_move(spec: dict[str, object]) -> None:
    desk = two_devices()
    desk.tell(deploy("a", **spec))  # type: ignore[arg-type]
    desk.ask(1, "a")
    desk.bring_up(1)
    (reject,) = desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))
    assert isinstance(reject, c.Reject)
    assert reject.status == 400


@pytest.mark.parametrize(("dram", "moves"), [(99, False), (100, True)])
def test_views_move_to_where_their_files_fit_beside_those_that_stay(dram: int, moves: bool) -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "view"),)))
    desk.serve("a", 1)
    desk.join(NodeSpec("n1", dram, (DeviceSpec(0, "cpu", 200, "view"),)))
    idle(desk, "pinned", 9, size=20, pinned=True)
    out = desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))
    assert ("Decided" in kinds(out), "Reject" in kinds(out)) == (moves, not moves)


def test_who_can_have_its_room_passes_who_waits_for_more() -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 150, "copy"),)))
    for name in ("idle", "busy"):
        idle(desk, name, ord(name[0]), size=30)
    desk.tick(60.0)
    desk.serve("a", 1, size=30)
    desk.ask(2, "busy")
    desk.ask(3, "a")
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=60))) == []
    assert desk.tell(e.SequenceRefused(3, 1, "no room", missing=30))[0] == c.Evicted(1, "idle", D0, "memory")


def test_who_has_begun_waits_for_devices_to_come() -> None:
    desk = beside(pinned=True)
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))) == []
    assert kinds(desk.tick(60.0)) == []
    assert kinds(desk.tell(e.Pin("idle", False))) == ["Evicted", "Unload"]


def test_room_that_another_s_end_frees_is_found_at_once() -> None:
    desk = crowd(30, 30)
    desk.ask(2, "y")
    desk.tell(e.SequenceRefused(1, 1, "no room", missing=20))
    assert kinds(desk.tell(e.SequenceRefused(2, 1, "no room", missing=20))) == []
    desk.tell(e.Unloaded(1))
    assert kinds(desk.tick(0.1)) == ["Dispatch"]
    desk.ask(3, "a")
    assert kinds(desk.tell(e.SequenceDone(1, 2, DONE, 3))) == ["Dispatch"]


def test_memory_that_the_device_turned_out_not_to_have_is_reckoned_with() -> None:
    desk = crowd(30, 10)
    device = desk.machine.state.devices[D0]
    device.shortfall = 30
    desk.ask(2, "a")
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))) == ["Evicted", "Unload"] * 2
    device.shortfall = 100
    desk.tell(e.SequenceRefused(2, 1, "no room", missing=30))  # shares what was promised before
    assert [*desk.machine.state.replicas[3].promises] == [1, 2]


@pytest.mark.parametrize("spec", [{"min_replicas": 1}, {"pinned": True}], ids=str)
def test_who_has_begun_waits_where_its_model_may_not_leave(spec: dict[str, object]) -> None:
    desk = two_devices()
    desk.tell(deploy("a", **spec))  # type: ignore[arg-type]
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))) == []
    assert kinds(desk.tick(60.0)) == []


@pytest.mark.parametrize(("budget", "told"), [(129, "Reject"), (130, "Decided"), (0, "")])
def test_what_no_device_can_have_is_told_where_all_are_known(budget: int, told: str) -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.join(NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", budget, "copy"),)))
    out = kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=budget > 100)))
    assert out[:1] == [told][: bool(told)]


def test_nothing_moves_to_a_drained_device() -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"),)))
    desk.join(NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", 200, "copy"),)))
    desk.serve("a", 1)
    desk.tell(e.Drain("n1", True))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))) == []
    assert kinds(desk.tick(60.0)) == []
    assert "Decided" in kinds(desk.tell(e.Drain("n1", False)))


def test_one_of_two_replicas_moves() -> None:
    desk = Desk(STILL)
    budgets = enumerate((100, 100, 200))
    desk.join(NodeSpec("n0", 1000, tuple(DeviceSpec(number, "cpu", size, "copy") for number, size in budgets)))
    idle(desk, "large", 9, size=170)
    desk.ask(8, "large")
    desk.serve("a", 1, max_replicas=2, max_concurrency=1)
    desk.ask(2, "a")
    desk.bring_up(3, D1)
    desk.tell(e.SequenceDone(8, 1, DONE, 3))
    desk.tick(60.0)
    out = desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True))
    assert [one for one in out if isinstance(one, c.Evicted)] == [
        c.Evicted(1, "large", DeviceId("n0", 2), "memory"),
        c.Evicted(2, "a", D0, "memory"),
    ]
    assert desk.machine.state.replicas[3].retiring == ""
