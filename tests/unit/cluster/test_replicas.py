"""Loads and their failures, deadlines and compensations."""

from __future__ import annotations

import math

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.domain import DeviceSpec, FinishReason, LoadPhases, NodeSpec
from tests.unit.cluster.desk import D0, D1, PHASES, QUIET, Desk, deploy, kinds, node

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    """One device, and one deployed model."""
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    return desk


def test_fifty_waiters_of_one_model_share_one_load(desk: Desk) -> None:
    out = [one for number in range(50) for one in desk.ask(number, "a")]
    assert kinds(out) == ["Decided", "Reserve"]
    assert kinds(desk.bring_up(1)) == ["Outcome", *["Dispatch"] * 50]


def test_answers_nobody_waits_for_change_nothing(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.Reserved(D0, 1))
    before = str(desk.machine.state)
    for event in (
        e.Reserved(D0, 1),
        e.Reserved(D0, 77),
        e.Refused(D0, 1, 5),
        e.Refused(D0, 77, 5),
        e.LoadProgress(77, 1, 2),
        e.ReplicaReady(77, PHASES),
        e.LoadFailed(77, "no", False),
        e.Unloaded(1),
        e.Unloaded(77),
    ):
        assert desk.tell(event) == []
    assert str(desk.machine.state) == before


def test_a_load_told_ready_twice_is_ready_once(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.bring_up(1)
    assert desk.tell(e.ReplicaReady(1, PHASES)) == []
    assert desk.tell(e.LoadFailed(1, "late", False)) == []
    assert desk.tell(e.LoadProgress(1, 1, 2)) == []
    assert ("replica", 1) not in desk.machine.state.timers


def test_a_deleted_models_load_that_nobody_waited_for_is_not_abandoned_once_more() -> None:
    desk = Desk(Policy(silent_after=1e9, unload_s=1e9, load_floor_s=1e9))
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    assert kinds(desk.tell(e.Delete("a"))) == ["Evicted", "Unload"]
    assert desk.tick(100.0) == []


def test_a_claim_that_is_given_up_is_not_abandoned_once_more(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert kinds(desk.tick(1.0)) == ["Decided", "Evicted", "Unload"]
    desk.tell(e.ClientGone(2))
    assert kinds(desk.tell(e.UnloadModel("b"))) == ["Evicted"]
    desk.tell(e.Unloaded(1))
    assert desk.tick(100.0) == []


def test_what_a_start_takes_beside_its_bytes_is_learned(desk: Desk) -> None:
    known = desk.machine.state.nodes["n0"]
    known.bandwidth["disk"] = 10.0
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ReplicaReady(1, LoadPhases(disk_s=8.0, total_s=8.5, disk_bytes=80)), after=9.0)
    assert round(known.overhead_s, 6) == round(0.05 + 0.3 * (1.0 - 0.05), 6)


def test_a_model_that_is_wanted_for_good_starts_again_when_it_has_cooled() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", min_replicas=1))
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "bad header", False))
    assert desk.tell(e.Unloaded(1)) == []
    assert kinds(desk.tick(1.0)) == ["Decided", "Reserve"]


def test_a_load_that_is_wanted_for_good_by_now_is_not_abandoned() -> None:
    desk = Desk(Policy(silent_after=1e9, load_floor_s=1e9))
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(deploy("a", min_replicas=1))
    desk.tell(e.ClientGone(1))
    assert desk.tick(1000.0) == []


def test_what_never_ends_has_no_deadline(desk: Desk) -> None:
    desk.tell(deploy("a", keep_alive=math.inf))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert ("idle", 1) not in desk.machine.state.timers
    desk.tell(deploy("b", size=10))
    desk.tell(e.UnloadModel("a"))
    desk.tell(e.Unloaded(1))
    desk.tell(e.Load("b"))
    desk.tell(e.Reserved(D0, 2))
    desk.tell(e.LoadFailed(2, "bad header", True))
    assert ("cool", "b") not in desk.machine.state.timers


@pytest.mark.parametrize("event", [deploy("a"), e.Delete("a")])
def test_who_is_deployed_anew_or_deleted_need_not_cool(desk: Desk, event: e.Event) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "bad header", False))
    assert ("cool", "a") in desk.machine.state.timers
    desk.tell(event)
    assert ("cool", "a") not in desk.machine.state.timers


def test_copies_need_no_dram_to_stay_in() -> None:
    desk = Desk(QUIET)
    desk.join(node(dram=10))
    desk.tell(deploy("a"))
    assert kinds(desk.ask(1, "a")) == ["Decided", "Reserve"]


def test_a_view_waits_for_the_last_byte_of_dram() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2, weights="view", dram=100))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.serve("a", 1)
    desk.tell(e.WorkerUp(D0, 2))
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    desk.tell(deploy("b", size=21))
    assert kinds(desk.ask(2, "b")) == ["Decided"]
    assert kinds(desk.tell(e.Unloaded(1))) == ["Reserve"]


def test_a_failed_load_tells_its_waiters_and_cools_down_twice_as_long_each_time(desk: Desk) -> None:
    pauses = []
    for sequence in range(1, 9):
        desk.ask(sequence, "a")
        desk.tell(e.Reserved(D0, sequence))
        evict, reject = desk.tell(e.LoadFailed(sequence, "model.safetensors: bad header", False))
        assert evict == c.Unload(sequence, D0)
        assert isinstance(reject, c.Reject)
        assert (reject.status, reject.code, reject.retry) == (503, "model_load_failed", True)
        assert reject.message == "model.safetensors: bad header"
        pauses.append(reject.retry_after)
        desk.tell(e.Unloaded(sequence))
        desk.tick(reject.retry_after or 0.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_arrivals_in_the_cool_down_are_told_at_once(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "why", False))
    assert desk.tell(e.RequestArrived(2, "a", "sha-a"), after=0.5) == [
        c.Reject(2, 503, "model_load_failed", "why", 1.0, True)
    ]
    desk.join(node("n1"))
    assert desk.machine.state.models["a"].error == "why"


def test_a_permanent_failure_lasts_until_the_next_deploy(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "why", True))
    desk.tell(e.Unloaded(1))
    reject = c.Reject(2, 503, "model_load_failed", "why", None, False)
    assert desk.tell(e.RequestArrived(2, "a", "sha-a"), after=1e6) == [reject]
    desk.tell(deploy("a"))
    assert kinds(desk.ask(3, "a")) == ["Decided", "Reserve"]


@pytest.mark.parametrize("permanent", [True, False])
def test_an_operators_load_is_a_new_try_whatever_failed(desk: Desk, permanent: bool) -> None:
    for replica in (1, 2):
        assert kinds(desk.tell(e.Load("a"))) == ["Decided", "Reserve"]
        desk.tell(e.Reserved(D0, replica))
        desk.tell(e.LoadFailed(replica, "why", permanent))
        desk.tell(e.Unloaded(replica))
    pause = None if permanent else 2.0  # the second in a row
    assert desk.tell(e.RequestArrived(1, "a", "sha-a")) == [
        c.Reject(1, 503, "model_load_failed", "why", pause, not permanent)
    ]


def test_a_load_that_fails_beside_a_replica_that_serves_rejects_nobody() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    desk.serve("a", 1, max_replicas=2, max_concurrency=1)
    desk.ask(2, "a")
    desk.tell(e.Reserved(D1, 2))
    assert kinds(desk.tell(e.LoadFailed(2, "why", False))) == ["Unload"]
    assert kinds(desk.tell(e.SequenceDone(1, 1, DONE, 3))) == ["Dispatch"]


def test_a_model_that_fits_nowhere_is_refused_with_the_bytes(desk: Desk) -> None:
    desk.tell(deploy("big", size=95))
    (reject,) = desk.tell(e.RequestArrived(1, "big", "sha-big"))
    assert reject == c.Reject(
        1,
        503,
        "model_load_failed",
        "big fits on no device: it takes 105 B (weights and least KV) of a device that has at most 100 B: serve has"
        " --device-memory",
        None,
        False,
    )


@pytest.mark.parametrize(
    ("size", "dram", "budget", "why"),
    [
        (90, 80, 100, "device: views of its weights take 90 B of a node's DRAM that has at most 80 B: serve has"),
        (95, 80, 100, "at most 100 B: serve has --device-memory; views of its weights take 95 B"),
        (90, 1000, 100, ""),
        (95, 1000, 0, ""),
    ],
)
def test_what_fits_nowhere_is_told_when_it_is_deployed(size: int, dram: int, budget: int, why: str) -> None:
    desk = Desk(QUIET)
    desk.join(NodeSpec("n0", dram, (DeviceSpec(0, "cpu", budget, "view"),)))
    desk.tell(deploy("big", size=size))
    error = desk.machine.state.models["big"].error
    assert why in error
    assert bool(error) == bool(why)
    early = Desk(QUIET)
    early.tell(deploy("big", size=size))
    assert early.machine.state.models["big"].error == "", "no device is known"
    early.join(NodeSpec("n0", dram, (DeviceSpec(0, "cpu", budget, "view"),)))
    assert early.machine.state.models["big"].error == error
    early.join(NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", 1000, "view"),)))
    assert early.machine.state.models["big"].error == ""


def test_memory_that_just_suffices_is_not_blamed() -> None:
    desk = Desk(QUIET)
    desk.join(NodeSpec("n0", 95, (DeviceSpec(0, "cpu", 100, "view"),)))
    desk.tell(deploy("big", size=95))
    assert desk.machine.state.models["big"].error.endswith("that has at most 100 B: serve has --device-memory")


def test_memory_here_and_dram_there_is_no_place() -> None:
    desk = Desk(QUIET)
    desk.join(NodeSpec("n0", 80, (DeviceSpec(0, "cpu", 200, "view"),)))
    desk.join(NodeSpec("n1", 1000, (DeviceSpec(0, "cpu", 90, "view"),)))
    desk.tell(deploy("big", size=95))
    assert desk.machine.state.models["big"].error == ("big fits on no device: none has both the memory and the DRAM")


def test_a_stuck_load_is_placed_anew_once_then_the_model_has_failed(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadProgress(1, 40, 80), after=9.0)
    desk.tell(e.LoadProgress(1, 40, 80), after=5.0)  # no news
    out = desk.tick(5.0)
    assert kinds(out) == ["Unload", "Decided"]
    late = desk.tell(e.ReplicaReady(1, PHASES))
    assert late == [c.Unload(1, D0)]
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 2, 90)]
    desk.tell(e.Reserved(D0, 2))
    unload, reject = desk.tick(10.0)
    assert unload == c.Unload(2, D0)
    assert isinstance(reject, c.Reject)
    assert reject.message == "loading got stuck 2 times, last on n0/0"
    assert reject.retry
    assert desk.machine.state.models["a"].expiries == 0


def test_a_reserve_without_answer_kills_the_worker_then_the_node_is_dropped(desk: Desk) -> None:
    desk.ask(1, "a")
    assert desk.tick(30.0) == [c.KillWorker(D0, 1)]
    assert desk.tick(10.0) == [c.DropNode("n0")]
    desk.tick(5.0)
    assert desk.machine.state.nodes == {}


def test_an_unload_without_answer_kills_the_worker(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert kinds(desk.tell(e.UnloadModel("a"))) == ["Evicted", "Unload"]
    assert desk.tick(30.0) == [c.KillWorker(D0, 1)]
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert desk.machine.state.replicas == {}


def test_nothing_is_started_on_a_worker_that_is_being_killed() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.tell(deploy("b", size=30))
    desk.ask(1, "a")
    desk.tick(29.0)
    desk.ask(2, "b")
    desk.bring_up(2)
    assert desk.tick(1.0) == [c.KillWorker(D0, 1)]
    assert desk.ask(3, "b") == []
    assert desk.tell(e.UnloadModel("a")) == []
    assert desk.tick(10.0) == [c.DropNode("n0")]


def test_a_worker_is_killed_once_however_much_it_leaves_unanswered() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.tell(deploy("b", size=30))
    desk.ask(1, "a")
    desk.ask(2, "b")
    assert desk.tick(30.0) == [c.KillWorker(D0, 1)]


def test_a_worker_that_refuses_is_left_alone_and_believed_to_be_short() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.tell(deploy("b", size=30))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.ask(2, "b")
    assert desk.tell(e.Refused(D0, 2, 25)) == []
    again = desk.tick(1.0)
    assert kinds(again) == ["Decided", "Evicted", "Unload"]  # 100 - 25 do not hold both
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 3, 40)]
    desk.tell(e.Reserved(D0, 3))
    assert desk.machine.state.devices[D0].shortfall == 0


def test_what_a_device_lacks_adds_up() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.ask(1, "a")
    desk.tell(e.Refused(D0, 1, 20))
    desk.tick(1.0)
    desk.tell(e.Refused(D0, 2, 5))
    assert desk.machine.state.devices[D0].shortfall == 25


def test_a_device_that_refused_is_left_alone_for_a_second() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", size=30))
    desk.ask(1, "a")
    assert desk.tell(e.Refused(D0, 1, 5)) == []
    assert desk.ask(2, "a") == []
    assert kinds(desk.tick(1.0)) == ["Decided", "Reserve"]


def test_a_claim_waits_until_the_shortfall_is_forgotten() -> None:
    desk = Desk(QUIET)
    desk.join()
    for name in ("a", "b", "x"):
        desk.tell(deploy(name, size=30))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.ask(2, "b")
    desk.tick(1.0)
    assert kinds(desk.ask(3, "x")) == ["Decided", "Evicted", "Unload"]
    desk.tell(e.Refused(D0, 2, 70))
    assert desk.tell(e.Unloaded(1)) == []
    desk.tell(e.RequestArrived(4, "nope", "sha-nope"), after=29.0)
    assert desk.tick(1.0)[0] == c.Reserve(D0, 3, 40)


def test_a_shortfall_is_forgotten_after_a_while(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Refused(D0, 1, 25))
    assert desk.tick(1.0) == []
    assert kinds(desk.tick(29.0)) == ["Decided", "Reserve"]


def test_a_load_nobody_waits_for_goes_on_for_a_minute(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    desk.tell(e.RequestArrived(2, "nope", "sha-nope"))
    for second in range(1, 60):
        assert desk.tell(e.LoadProgress(1, second, 80), after=1.0) == []
    assert desk.tick(1.0) == [c.Evicted(1, "a", D0, "abandoned"), c.Unload(1, D0)]


def test_other_news_does_not_prolong_an_abandoned_load() -> None:
    desk = Desk(Policy(silent_after=1e9, load_floor_s=1e9))
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    desk.tell(e.Pin("a", False), after=59.0)
    assert kinds(desk.tick(1.0)) == ["Evicted", "Unload"]


def test_an_abandoned_load_that_somebody_wants_again_goes_on(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    assert desk.tell(e.RequestArrived(2, "a", "sha-a"), after=5.0) == []
    assert ("abandon", 1) not in desk.machine.state.timers


def test_a_request_at_the_last_moment_saves_the_load() -> None:
    desk = Desk(Policy(silent_after=1e9, load_floor_s=1e9))
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    assert desk.tell(e.RequestArrived(2, "a", "sha-a"), after=60.0) == []
    assert desk.machine.state.replicas[1].state is ReplicaState.LOADING


def test_an_abandoned_load_that_ends_stays_by_its_keep_alive(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    assert kinds(desk.tell(e.ReplicaReady(1, PHASES))) == ["Outcome"]
    assert kinds(desk.tick(300.0)) == ["Evicted", "Unload"]


def test_an_abandoned_load_makes_way_at_once(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ClientGone(1))
    decided, evicted, unload = desk.tell(e.RequestArrived(2, "b", "sha-b"))
    assert isinstance(decided, c.Decided)
    assert decided.victims == (1,)
    assert (evicted, unload) == (c.Evicted(1, "a", D0, "abandoned"), c.Unload(1, D0))
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 2, 90)]


def test_an_abandoned_claim_makes_way_without_a_word(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.tell(deploy("x"))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tick(1.0)
    desk.tell(e.RequestArrived(2, "b", "sha-b"))
    desk.tell(e.ClientGone(2))
    out = desk.tell(e.RequestArrived(3, "x", "sha-x"))
    assert out[1:] == [c.Evicted(2, "b", D0, "abandoned")]
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 3, 90)]


def test_a_node_learns_its_overhead(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ReplicaReady(1, LoadPhases(disk_s=4.0, total_s=5.0, disk_bytes=80)), after=5.0)
    assert desk.machine.state.nodes["n0"].overhead_s == pytest.approx(0.7 * 0.05 + 0.3 * 1.0)


@pytest.mark.parametrize(("weights", "own_s"), [("copy", 0.5), ("view", 0.75)])  # mapping is no bytes' moving
def test_a_link_that_is_slower_than_believed_is_no_overhead(weights: str, own_s: float) -> None:
    desk = Desk(QUIET)
    desk.join(node(weights=weights))
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    phases = LoadPhases(queue_s=1.0, remote_s=16.0, disk_s=2.0, upload_s=0.25, remote_bytes=80)
    desk.tell(e.ReplicaReady(1, phases), after=19.75)
    assert desk.machine.state.nodes["n0"].overhead_s == pytest.approx(0.7 * 0.05 + 0.3 * own_s)


def test_a_load_from_the_page_cache_is_no_sample_of_the_disk(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (("disk", 20.0),)))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.ReplicaReady(1, LoadPhases(disk_s=0.001, disk_bytes=1, cache_bytes=79)))
    assert desk.machine.state.nodes["n0"].bandwidth == {"disk": 20.0}
