"""Nodes and workers: joining, adoption, silence, loss, and the correction of beliefs by reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, D1, PHASES, QUIET, Desk, deploy, kinds, node, serving

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    return serving()


def test_a_new_head_adopts_what_the_agents_hold() -> None:
    desk = Desk()
    desk.tell(deploy("a", size=30))
    desk.ask(1, "a")
    out = desk.join(held=(e.HeldReplica(41, D0, "a", "sha-a", "auto"),))
    assert out == [c.Dispatch(1, 1, 41, D0, 0.0, None)]
    desk.tell(deploy("b", size=30))
    desk.ask(2, "b")
    assert 42 in desk.machine.state.replicas  # ids of former heads are never given again


def test_what_joins_late_from_a_former_head_meets_no_new_replica_of_its_id() -> None:
    desk = Desk(QUIET, generation=1)
    desk.tell(deploy("a"))
    desk.tell(deploy("b", size=40))
    desk.join()
    _, reserve = desk.ask(1, "b")
    assert reserve == c.Reserve(D0, (1 << 32) + 1, 50)
    n1 = DeviceId("n1", 0)
    assert desk.join(node("n1"), (e.HeldReplica(1, n1, "a", "sha-a", "auto"),)) == []
    assert sorted(desk.machine.state.replicas) == [1, (1 << 32) + 1]


def test_an_id_that_is_taken_is_not_adopted() -> None:
    desk = Desk(QUIET)
    desk.tell(deploy("a", max_replicas=2))
    desk.join()
    desk.ask(1, "a")
    n1 = DeviceId("n1", 0)
    held = (e.HeldReplica(1, n1, "a", "sha-a", "auto"),)
    assert desk.join(node("n1"), held)[0] == c.Unload(1, n1)
    assert desk.machine.state.replicas[1].device == D0


@pytest.mark.parametrize(
    "held",
    [
        e.HeldReplica(5, D0, "a", "sha-other", "auto"),
        e.HeldReplica(5, D0, "a", "sha-a", "float32"),
        e.HeldReplica(5, D0, "gone", "sha-a", "auto"),
        e.HeldReplica(5, D0, "big", "sha-big", "auto"),
        e.HeldReplica(5, D1, "a", "sha-a", "auto"),
    ],
)
def test_what_no_model_wants_is_unloaded(held: e.HeldReplica) -> None:
    desk = Desk()
    desk.tell(deploy("a"))
    desk.tell(deploy("big", size=99))
    out = desk.tell(e.NodeJoined(node(devices=2), ((D0, 3), (D1, 0)), (held,), ()))
    assert out == [c.Unload(5, held.device)]
    assert desk.machine.state.replicas == {}


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_is_adopted_than_a_model_may_have_on_a_device(most: int) -> None:
    desk = Desk()
    desk.tell(deploy("a", size=30, max_replicas=most))
    held = tuple(e.HeldReplica(number, D0, "a", "sha-a", "auto") for number in (1, 2))
    assert desk.join(held=held) == [c.Unload(2, D0)]


def test_adopted_views_must_fit_the_dram() -> None:
    desk = Desk()
    desk.tell(deploy("a", size=30))
    desk.tell(deploy("b", size=30))
    held = tuple(e.HeldReplica(number, D0, name, f"sha-{name}", "auto") for number, name in ((1, "a"), (2, "b")))
    assert desk.join(node(weights="view", dram=50), held) == [c.Unload(2, D0)]


def test_adopted_views_of_one_checkpoint_share_the_dram() -> None:
    desk = Desk()
    desk.tell(deploy("a", size=30, max_replicas=2))
    held = tuple(e.HeldReplica(number, device, "a", "sha-a", "auto") for number, device in ((1, D0), (2, D1)))
    assert desk.join(node(devices=2, weights="view", dram=30), held) == []
    assert sorted(desk.machine.state.replicas) == [1, 2]


def test_what_is_adopted_is_idle_from_then_on() -> None:
    desk = Desk(QUIET)
    desk.tell(deploy("a", keep_alive=10.0))
    desk.tick(100.0)
    assert desk.join(held=(e.HeldReplica(1, D0, "a", "sha-a", "auto"),)) == []
    assert desk.tick(9.9) == []
    assert kinds(desk.tick(0.1)) == ["Evicted", "Unload"]


def test_what_is_adopted_keeps_its_place_for_as_long_as_what_was_loaded() -> None:
    desk = Desk(QUIET)
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.ask(1, "b")
    desk.tick(100.0)
    desk.ask(2, "a")
    assert kinds(desk.join(held=(e.HeldReplica(1, D0, "a", "sha-a", "auto"),))) == ["Dispatch"]
    desk.tick(1.9)
    assert desk.machine.state.replicas[1].draining_for == ""
    desk.tick(0.1)
    assert desk.machine.state.replicas[1].draining_for == "b"


@pytest.mark.parametrize("news", [e.WorkerUp(D0, 2), e.Heartbeat("n0", ((D0, 2, ()),), (), ())])
def test_a_death_that_only_the_next_worker_tells_of_is_charged(desk: Desk, news: e.Event) -> None:
    desk.tell(news)
    assert desk.machine.state.sequences[1].deaths == 1


def test_a_load_under_way_hides_no_replica_that_is_not_there() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.tell(deploy("b", size=30))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.ask(2, "b")
    desk.bring_up(2)
    desk.beat(1)
    assert 2 in desk.machine.state.replicas
    desk.beat(1, after=2.0)
    assert sorted(desk.machine.state.replicas) == [1, 3]


def test_a_worker_has_let_go_of_whom_it_does_not_mention(desk: Desk) -> None:
    desk.ask(2, "a")
    desk.tell(e.ClientGone(1))
    assert desk.machine.state.devices[D0].recalled == {1}
    desk.tell(e.Progress(D0, 1, ((2, 1, 3, 1),)))
    assert desk.machine.state.devices[D0].recalled == set()


def test_bytes_of_a_model_that_nobody_uses_stay_in_dram() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    assert desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (("sha-a", 80),), ())) == []


def test_a_lost_worker_gives_its_sequences_and_its_memory_back(desk: Desk) -> None:
    assert kinds(desk.tell(e.WorkerLost(D0, 1, "killed"))) == []
    assert desk.machine.state.replicas == {}
    assert kinds(desk.tell(e.WorkerUp(D0, 2))) == ["Decided", "Reserve"]
    _, dispatch = desk.bring_up(2)
    assert dispatch == c.Dispatch(1, 2, 2, D0, 0.0, None)


def test_a_new_worker_tells_of_the_old_ones_death(desk: Desk) -> None:
    assert kinds(desk.tell(e.WorkerUp(D0, 2))) == ["Decided", "Reserve"]
    assert desk.machine.state.devices[D0].cause == "replaced by worker 2"
    assert desk.tell(e.WorkerLost(D0, 1, "killed")) == []
    assert desk.machine.state.devices[D0].incarnation == 2


def test_late_news_of_former_workers_is_ignored(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 3, "killed"))
    assert desk.machine.state.devices[D0].incarnation == 0
    assert desk.tell(e.WorkerUp(D0, 3)) == []
    assert desk.tell(e.WorkerUp(D0, 1)) == []
    assert desk.tell(e.WorkerUp(D1, 1)) == []
    assert desk.tell(e.WorkerLost(D1, 1, "killed")) == []
    assert desk.tell(e.WorkerLost(D0, 3, "killed")) == []
    assert kinds(desk.tell(e.WorkerUp(D0, 4))) == ["Decided", "Reserve"]


def test_a_lost_node_is_forgotten_and_its_sequences_go_elsewhere(desk: Desk) -> None:
    desk.tell(e.NodeJoined(node("n1"), ((DeviceId("n1", 0), 1),), (), ()))
    out = desk.tell(e.NodeLost("n0"))
    assert kinds(out) == ["Decided", "Reserve"]
    assert list(desk.machine.state.nodes) == ["n1"]
    assert desk.machine.state.sequences[1].deaths == 0
    assert desk.tell(e.NodeLost("n0")) == []
    assert desk.tell(e.Heartbeat("n0", (), (), ())) == []


def test_a_node_that_joins_again_was_lost_first(desk: Desk) -> None:
    out = desk.join(held=(e.HeldReplica(1, D0, "a", "sha-a", "auto"),))
    assert out == [c.Dispatch(1, 2, 1, D0, 0.0, None)]


def test_a_silent_node_is_dropped_after_five_seconds_and_may_come_back() -> None:
    desk = Desk()
    desk.join()
    desk.serve("a", 1)
    for _ in range(10):
        assert desk.beat(1, after=1.0) == []
    assert desk.tick(4.9) == []
    assert desk.tick(0.1) == [c.DropNode("n0")]
    assert desk.machine.state.replicas == {}
    for late in (e.Heartbeat("n0", ((D0, 1, (1,)),), (), ()), e.WorkerUp(D0, 2), e.Progress(D0, 1, ((1, 1, 3, 1),))):
        assert desk.tell(late) == []
    held = (e.HeldReplica(1, D0, "a", "sha-a", "auto"),)
    assert desk.join(held=held) == [c.Dispatch(1, 2, 1, D0, 14.9 + 0.1, None)]


def test_a_node_that_cannot_be_dropped_is_taken_for_lost() -> None:
    desk = Desk()
    desk.join()
    desk.tick(5.0)
    assert list(desk.machine.state.nodes) == ["n0"]
    desk.tick(5.0)
    assert desk.machine.state.nodes == {}
    assert desk.machine.state.devices == {}


def test_a_replica_that_heartbeats_leave_out_is_gone(desk: Desk) -> None:
    assert desk.beat(after=1.0) == []
    assert desk.beat(1, after=1.0) == []
    assert desk.beat(after=1.0) == []
    out = desk.beat(after=2.0)
    assert kinds(out) == ["Cancel", "Decided", "Reserve"]
    assert list(desk.machine.state.replicas) == [2]


def test_a_load_is_not_missed_in_heartbeats() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    for _ in range(9):
        assert desk.beat(after=1.0) == []


def test_a_replica_nobody_knows_is_unloaded(desk: Desk) -> None:
    assert desk.beat(1, 9, 4) == [c.Unload(4, D0), c.Unload(9, D0)]


def test_an_unload_that_got_lost_is_told_again(desk: Desk) -> None:
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    assert desk.beat(1, after=1.0) == []
    assert desk.beat(1, after=1.0) == [c.Unload(1, D0)]


def test_an_answer_to_unload_that_got_lost_is_seen_in_heartbeats(desk: Desk) -> None:
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    desk.beat(after=1.0)
    desk.beat(after=2.0)
    assert desk.machine.state.replicas == {}


def test_a_worker_that_heartbeats_leave_out_is_lost(desk: Desk) -> None:
    assert desk.beat(incarnation=0, after=1.0) == []
    assert list(desk.machine.state.replicas) == [1]
    desk.beat(incarnation=0, after=2.0)
    assert desk.machine.state.replicas == {}
    assert desk.machine.state.devices[D0].cause == "its agent does not know it"
    assert desk.beat(incarnation=0, after=3.0) == []
    assert kinds(desk.beat(incarnation=2, after=1.0)) == ["Decided", "Reserve"]


def test_a_worker_that_heartbeats_leave_out_now_and_then_is_there(desk: Desk) -> None:
    for _ in range(3):
        desk.beat(incarnation=0, after=1.5)
        desk.beat(1, after=1.5)
    assert list(desk.machine.state.replicas) == [1]


def test_a_heartbeat_of_an_older_worker_says_nothing(desk: Desk) -> None:
    desk.tell(e.WorkerUp(D0, 2))
    assert desk.beat(1, incarnation=1) == []


def test_an_agent_that_still_lists_a_dead_worker_changes_nothing(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert desk.beat(after=1.0) == []
    assert desk.beat(after=3.0) == []
    assert desk.machine.state.devices[D0].cause == "killed"


def test_a_beat_keeps_its_node_for_five_seconds_from_then() -> None:
    desk = Desk()
    desk.join()
    desk.beat(after=0.5)
    assert desk.tick(4.5) == []
    assert desk.tick(0.5) == [c.DropNode("n0")]


def test_a_worker_that_is_to_die_is_not_listened_to_and_its_node_dropped_once() -> None:
    desk = Desk(Policy(silent_after=100.0, drop_s=200.0, unload_s=1.0, kill_s=1.0))
    desk.join()
    desk.serve("a", 1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    assert desk.tick(1.0) == [c.KillWorker(D0, 1)]
    assert desk.tell(e.Progress(D0, 1, ((77, 1, 3, 1),))) == []
    assert desk.tick(1.0) == [c.DropNode("n0")]
    assert desk.tick(100.0) == []


def test_what_can_fit_is_reckoned_with_the_devices_that_are_left() -> None:
    desk = Desk(QUIET)
    desk.join()
    large = DeviceId("n1", 0)
    desk.tell(e.NodeJoined(NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", 500, "copy"),)), ((large, 1),), (), ()))
    desk.tell(deploy("a"))

    def refused(sequence: int) -> bool:
        desk.tell(e.RequestArrived(sequence, "a", "sha-a"))
        return "Reject" in kinds(desk.tell(e.PromptReady(sequence, 500, 24)))

    assert not refused(1)
    desk.tell(e.NodeLost("n1"))
    assert refused(2)
    desk.tell(e.NodeLost("n0"))
    assert not refused(3)


def test_a_new_worker_is_not_blamed_for_what_the_old_one_refused() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=90))
    desk.tell(e.RequestArrived(1, "a", "sha-a"))
    desk.tell(e.Refused(D0, 1, 30))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert all((kind, D0) not in desk.machine.state.timers for kind in ("avoid", "short"))
    assert kinds(desk.tell(e.WorkerUp(D0, 2))) == ["Decided", "Reserve"]


@pytest.mark.parametrize(
    ("size", "weights", "dram", "adopted"),
    [(90, "copy", 10, True), (91, "copy", 1000, False), (90, "view", 90, True), (90, "view", 89, False)],
)
def test_what_fits_to_the_byte_is_adopted(size: int, weights: str, dram: int, adopted: bool) -> None:
    desk = Desk()
    desk.tell(deploy("a", size=size))
    out = desk.join(node(weights=weights, dram=dram), (e.HeldReplica(1, D0, "a", "sha-a", "auto"),))
    assert out == ([] if adopted else [c.Unload(1, D0)])


def test_heartbeats_tell_speeds_and_dram(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), (("sha-a", 80),), (("disk", 7.0),)))
    known = desk.machine.state.nodes["n0"]
    assert (known.resident, known.bandwidth, known.lent) == ({"sha-a": 80}, {"disk": 7.0}, {})
    desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), (), (), (("sha-b", 70),)))
    assert (known.resident, known.lent) == ({}, {"sha-b": 70})
    desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), (), (), away=(("sha-a", 5),)))
    assert (known.lent, known.away) == ({}, {"sha-a": 5})


def test_checkpoints_nobody_names_leave_the_dram(desk: Desk) -> None:
    resident = (("sha-a", 80), ("sha-old", 80))
    assert desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), resident, ())) == [c.Forget("n0", "sha-old")]
    desk.tell(e.Delete("a"))
    still = desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), resident, ()))
    assert still == [c.Forget("n0", "sha-old")]  # a replica serves its last sequence


def test_a_load_on_a_lost_worker_starts_elsewhere() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    _, reserve = desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert reserve == c.Reserve(D1, 2, 90)
    assert desk.tell(e.ReplicaReady(1, PHASES)) == []


def test_a_claim_on_a_lost_worker_is_not_reserved_there() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=0.0)
    desk.tell(deploy("b"))
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert kinds(desk.ask(2, "b")) == ["Decided"]
    assert desk.machine.state.replicas[2].state is ReplicaState.CLAIMING
    assert desk.tell(e.WorkerLost(D0, 1, "killed")) == []
    assert desk.machine.state.replicas == {}


def fail_boots(desk: Desk, times: int, device: DeviceId = D0) -> list[c.Command]:
    """Workers from incarnation 1 on die before they are up; what the last death brought about."""
    out: list[c.Command] = []
    for incarnation in range(1, times + 1):
        out = desk.tell(e.WorkerLost(device, incarnation, "no CUDA driver"))
    return out


def down(devices: int = 1, **spec: object) -> Desk:
    """A desk whose node's workers are not up, and whose model has a request waiting."""
    desk = Desk(QUIET)
    desk.tell(e.NodeJoined(node(devices=devices), (), (), ()))
    desk.tell(deploy("a", **spec))  # type: ignore[arg-type]
    assert desk.ask(1, "a") == []
    return desk


def test_who_waits_for_devices_that_never_come_up_is_told_why() -> None:
    desk = down()
    assert fail_boots(desk, 2) == []
    why = "no device comes up: n0/0 is not up (3 boots failed): no CUDA driver"
    refused = c.Reject(1, 503, "model_load_failed", why, 5.0, True)
    assert desk.tell(e.WorkerLost(D0, 3, "no CUDA driver")) == [refused]
    assert desk.tell(e.RequestArrived(2, "a", "sha-a")) == [replace(refused, sequence=2)]


def test_a_boot_that_fails_counts_once_and_one_that_succeeds_clears_the_count() -> None:
    desk = down()
    for _ in range(3):
        assert fail_boots(desk, 2) == []
    assert desk.machine.state.devices[D0].failed_boots == 2
    assert kinds(desk.tell(e.WorkerUp(D0, 3))) == ["Decided", "Reserve"]
    assert desk.machine.state.devices[D0].problem == ""
    desk.tell(e.WorkerLost(D0, 3, "killed"))
    assert fail_boots(desk, 5) == []
    assert desk.machine.state.devices[D0].problem == "n0/0 is not up (2 boots failed): no CUDA driver"


def test_one_device_that_may_come_up_is_worth_waiting_for() -> None:
    desk = down(devices=2)
    assert fail_boots(desk, 9) == []
    assert desk.machine.state.devices[D1].problem == "n0/1 is not up: its worker is starting"
    assert fail_boots(desk, 2, D1) == []
    (told,) = fail_boots(desk, 3, D1)
    assert isinstance(told, c.Reject)
    first, second = (
        f"n0/{number} is not up ({boots} boots failed): no CUDA driver" for number, boots in ((0, 9), (1, 3))
    )
    assert told.message == f"no device comes up: {first}; {second}"


def test_min_replicas_come_when_a_device_comes_up_after_all() -> None:
    desk = down(min_replicas=1)
    assert kinds(fail_boots(desk, 3)) == ["Reject"]
    assert kinds(desk.tell(e.WorkerUp(D0, 4))) == ["Decided", "Reserve"]


def test_who_waits_for_a_device_of_unknown_memory_is_told_why_it_is_not_up() -> None:
    desk = Desk(QUIET)
    unknown = NodeSpec("n0", 1000, (DeviceSpec(0, "cuda", 0, "copy"),))
    desk.tell(e.NodeJoined(unknown, (), (), ()))
    desk.tell(deploy("a"))
    assert desk.tell(e.RequestArrived(1, "a", "sha-a")) == []
    (told,) = fail_boots(desk, 3)
    assert isinstance(told, c.Reject)
    assert told.message.endswith("no CUDA driver")


def test_a_device_of_unknown_memory_may_hold_what_a_known_one_does_not() -> None:
    desk = Desk(QUIET)
    mixed = NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cuda", 0, "copy")))
    desk.tell(e.NodeJoined(mixed, ((D0, 1),), (), ()))
    desk.tell(deploy("big", size=95))
    assert desk.tell(e.RequestArrived(1, "big", "sha-big")) == []
    (told,) = fail_boots(desk, 3, D1)
    assert isinstance(told, c.Reject)
    assert (told.retry, told.message) == (True, "no device comes up: n0/1 is not up (3 boots failed): no CUDA driver")
