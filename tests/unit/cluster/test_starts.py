"""Where a replica starts, and how long that will take."""

from __future__ import annotations

from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, D1, STILL, Desk, decided, deploy, idle, kinds, node

DONE = FinishReason.STOP
OTHER = DeviceId("n1", 0)


def join(desk: Desk, name: str, resident: tuple[tuple[str, int], ...] = (), **bandwidth: float) -> None:
    desk.tell(e.NodeJoined(node(name), ((DeviceId(name, 0), 1),), (), resident))
    desk.machine.state.nodes[name].bandwidth.update(bandwidth)


def test_a_start_goes_where_the_bytes_are() -> None:
    desk = Desk(STILL)
    join(desk, "n0", disk=10.0)
    join(desk, "n1", (("sha-a", 80),), disk=10.0)
    desk.tell(deploy("a"))
    assert decided(desk.tell(e.RequestArrived(1, "a", "sha-a"))).device == OTHER


def test_a_start_goes_where_others_lend_the_bytes_unless_they_are_verified() -> None:
    for verify, seconds in (("off", 1.05), ("sample", 7.05)):
        desk = Desk(STILL)
        join(desk, "n0", (("sha-a", 10),), disk=10.0)
        desk.machine.state.nodes["n0"].lent["sha-a"] = 60
        desk.tell(deploy("a", verify=verify))
        assert round(decided(desk.ask(1, "a")).predicted_s, 6) == seconds


def test_what_is_lent_is_no_queue() -> None:
    desk = three()
    desk.machine.state.nodes["n0"].lent["sha-a"] = 60
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.tell(deploy("c", verify="full", checkpoint="sha-a"))
    desk.ask(1, "a")
    assert round(decided(desk.ask(2, "b")).predicted_s, 6) == 10.05
    desk.tell(e.Delete("a"))
    assert round(decided(desk.ask(3, "c")).predicted_s, 6) == 16.05


def test_bytes_that_a_server_has_come_at_the_speed_of_its_link() -> None:
    for away, held, seconds in ((None, 0, 10.05), (20, 0, 6.05), (50, 0, 6.3), (0, 0, 8.05), (50, 40, 5.05)):
        desk = Desk(STILL)
        join(desk, "n0", (("sha-a", held),), remote=8.0, disk=10.0)
        desk.machine.state.nodes["n0"].away.update({} if away is None else {"sha-a": away})
        desk.tell(deploy("a", remote_bytes=80))
        one = decided(desk.ask(1, "a"))
        assert round(one.predicted_s, 6) == seconds


def test_a_start_goes_where_a_disk_has_the_bytes() -> None:
    desk = Desk(STILL)
    join(desk, "n0", remote=8.0, disk=10.0)
    join(desk, "n1", remote=8.0, disk=10.0)
    desk.machine.state.nodes["n1"].away["sha-a"] = 0
    desk.tell(deploy("a", remote_bytes=80))
    assert decided(desk.ask(1, "a")).device == OTHER


def test_links_that_nothing_is_known_of_are_as_the_policy_says() -> None:
    desk = Desk(Policy(silent_after=1e9, remote_bps=4.0, disk_bps=5.0))
    join(desk, "n0")
    desk.tell(deploy("a", remote_bytes=20))
    assert round(decided(desk.ask(1, "a")).predicted_s, 6) == 12.05


def test_who_reads_from_a_server_waits_for_no_disk_nor_the_other_way_round() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=4))
    desk.machine.state.nodes["n0"].bandwidth.update(remote=8.0, disk=10.0)
    for number, (name, remote_bytes) in enumerate((("a", 80), ("b", 0), ("c", 80), ("d", 30)), 1):
        desk.tell(deploy(name, remote_bytes=remote_bytes))
        desk.ask(number, name)
    times = [round(one.predicted_s, 6) for one in desk.machine.state.replicas.values()]
    assert times == [10.05, 8.05, 20.05, max(13.0, 23.75) + 0.05]


def test_a_start_goes_to_the_faster_disk() -> None:
    desk = Desk(STILL)
    join(desk, "n0", disk=10.0)
    join(desk, "n1", disk=20.0)
    desk.tell(deploy("a"))
    one = decided(desk.tell(e.RequestArrived(1, "a", "sha-a")))
    assert (one.device, round(one.predicted_s, 6)) == (OTHER, 4.05)


def test_a_start_goes_where_it_takes_less_beside_its_bytes() -> None:
    desk = Desk(STILL)
    join(desk, "n0")
    join(desk, "n1")
    desk.machine.state.nodes["n0"].overhead_s = 1.0
    desk.tell(deploy("a"))
    assert decided(desk.tell(e.RequestArrived(1, "a", "sha-a"))).device == OTHER


def test_a_node_knows_its_links_when_it_joins() -> None:
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"),), {"disk": 10.0}))
    desk.tell(deploy("a"))
    assert round(decided(desk.ask(1, "a")).predicted_s, 6) == 8.05


def test_a_start_avoids_the_busy_link() -> None:
    desk = Desk(STILL)
    desk.join(node("n0", devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    join(desk, "n1", disk=8.0)
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    assert decided(desk.tell(e.RequestArrived(1, "a", "sha-a"))).device == D0
    assert decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).device == OTHER


def test_what_a_load_has_read_is_no_queue_any_more() -> None:
    desk = Desk(STILL)
    desk.join(node("n0", devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    join(desk, "n1", disk=8.0)
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadProgress(1, 79, 80))
    assert decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).device == D1


def test_what_is_read_to_its_end_is_no_queue_at_all() -> None:
    desk = Desk(STILL)
    desk.join(node("n0", devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadProgress(1, 80, 80))
    assert round(decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).predicted_s, 6) == 8.05


def test_replicas_of_one_checkpoint_share_its_reading() -> None:
    desk = Desk(STILL)
    desk.join(node("n0", devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    join(desk, "n1", disk=10.0)
    desk.tell(deploy("a", checkpoint="same"))
    desk.tell(deploy("b", checkpoint="same"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadProgress(1, 70, 80))
    one = decided(desk.tell(e.RequestArrived(2, "b", "same")))
    assert (one.device, round(one.predicted_s, 6)) == (D1, 1.05)


def three() -> Desk:
    """A node of three devices that reads ten bytes a second."""
    desk = Desk(STILL)
    desk.join(node(devices=3))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    return desk


def test_a_start_waits_for_what_others_still_read() -> None:
    desk = three()
    desk.machine.state.nodes["n0"].resident["sha-a"] = 60
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    assert round(decided(desk.ask(1, "a")).predicted_s, 6) == 2.05
    assert round(decided(desk.ask(2, "b")).predicted_s, 6) == 10.05


def test_a_start_waits_for_the_most_advanced_of_those_that_read_one_checkpoint() -> None:
    desk = three()
    desk.tell(deploy("a", min_replicas=2, max_replicas=2))
    desk.ask(9, "a")
    for replica in (1, 2):
        desk.tell(e.Reserved(desk.machine.state.replicas[replica].device, replica))
    desk.tell(e.LoadProgress(1, 40, 80))
    desk.tell(deploy("b"))
    assert round(decided(desk.ask(1, "b")).predicted_s, 6) == 12.05


def test_free_room_is_better_than_anothers() -> None:
    desk = Desk(STILL)
    desk.join(node("n0", devices=2))
    idle(desk, "a", 1)
    desk.tick(10.0)
    desk.tell(deploy("b"))
    assert decided(desk.tell(e.RequestArrived(2, "b", "sha-b"))).device == D1


def test_a_slow_device_with_room_loses_against_a_fast_one_with_a_stale_replica() -> None:
    desk = Desk(STILL)
    join(desk, "n0", (("sha-a", 80), ("sha-b", 80)))
    idle(desk, "a", 1)
    join(desk, "n1", disk=10.0)
    desk.tell(deploy("b"))
    desk.tick(250.0)
    one = decided(desk.tell(e.RequestArrived(2, "b", "sha-b")))
    assert (one.device, one.victims) == (D0, (1,))


def test_a_start_goes_where_the_victim_was_idle_longest() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    idle(desk, "a", 1)
    idle(desk, "b", 2)
    desk.ask(3, "a")
    desk.tell(e.SequenceDone(3, 1, DONE, 3), after=30.0)
    desk.tick(10.0)
    desk.tell(deploy("x"))
    assert decided(desk.tell(e.RequestArrived(4, "x", "sha-x"))).device == D1


def test_scaling_out_needs_waiters_that_nobody_can_take() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=3))
    desk.serve("a", 1, max_replicas=2, max_concurrency=1)
    assert kinds(desk.tell(e.RequestArrived(2, "a", "sha-a"))) == ["Decided", "Reserve"]
    assert desk.tell(e.RequestArrived(3, "a", "sha-a")) == []
    desk.bring_up(2, D1)
    assert desk.tell(e.RequestArrived(4, "a", "sha-a")) == []


def test_replicas_of_one_model_are_on_devices_of_their_own() -> None:
    desk = Desk(STILL)
    desk.join()
    assert kinds(desk.tell(deploy("a", size=20, min_replicas=2, max_replicas=3))) == ["Decided", "Reserve"]
    assert kinds(desk.bring_up(1)) == ["Outcome"]
    one = decided(desk.join(node("n1", devices=2)))
    assert one.device == DeviceId("n1", 0)


def test_crowds_get_no_second_replica_beside_the_first() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    desk.serve("a", 1, size=20, max_replicas=3, max_concurrency=1)
    assert decided(desk.ask(2, "a")).device == D1
    desk.bring_up(2, D1)
    assert desk.ask(3, "a") == []


def test_a_new_revision_starts_beside_what_still_runs_of_the_old_one() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1, size=20)
    desk.tell(deploy("a", size=20, checkpoint="sha-new"))
    assert decided(desk.ask(2, "a")).device == D0


def test_what_is_to_start_has_not_been_idle() -> None:
    desk = Desk(STILL)
    desk.join()
    desk.tell(deploy("a"))
    desk.tick(100.0)
    desk.ask(1, "a")
    assert desk.machine.state.replicas[1].idle_since == 100.0


def test_models_that_fit_beside_each_other_go_to_different_devices() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    found = []
    for number, name in enumerate("abcd"):
        desk.tell(deploy(name, size=10))
        found.append(decided(desk.ask(number, name)).device)
        desk.bring_up(number + 1, found[-1])
    assert found == [D0, D1, D0, D1]


def test_a_model_goes_where_nothing_runs_rather_than_where_less_is() -> None:
    desk = Desk(STILL)
    desk.join(node(devices=2))
    idle(desk, "a", 1, size=10)
    desk.tell(deploy("b", size=10))
    assert decided(desk.ask(2, "b")).device == D1
    desk.bring_up(2, D1)
    idle(desk, "c", 3, size=10)
    desk.tell(deploy("d", size=10))
    assert decided(desk.ask(4, "d")).device == D0
