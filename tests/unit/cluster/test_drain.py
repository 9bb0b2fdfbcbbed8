"""A node that its operator wants empty: what is there leaves, nothing new comes, until it is taken back."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster import views
from serverless_llm.domain import DeviceId, FinishReason
from tests.unit.cluster.desk import D0, PHASES, QUIET, Desk, deploy, kinds, node, serving

N1 = DeviceId("n1", 0)
DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    return serving()


def test_what_is_idle_leaves_at_once(desk: Desk) -> None:
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tell(e.Drain("n0", True)) == [c.Evicted(1, "a", D0, "drain"), c.Unload(1, D0)]


def test_what_must_stay_leaves_too() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", pinned=True, min_replicas=1))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert kinds(desk.tell(e.Drain("n0", True))) == ["Evicted", "Unload"]
    assert desk.tell(e.Unloaded(1)) == []


def test_what_runs_ends_there_and_who_comes_goes_elsewhere(desk: Desk) -> None:
    desk.join(node("n1"))
    assert desk.tell(e.Drain("n0", True)) == []
    decided, reserve = desk.ask(2, "a")
    assert isinstance(decided, c.Decided)
    assert isinstance(reserve, c.Reserve)
    assert decided.device == reserve.device == N1
    out = desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert out == [c.Evicted(1, "a", D0, "drain"), c.Unload(1, D0)]


def test_a_load_on_its_way_is_begun_elsewhere() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.join(node("n1"))
    out = desk.tell(e.Drain("n0", True))
    assert kinds(out) == ["Evicted", "Unload", "Decided", "Reserve"]
    desk.tell(e.Reserved(N1, 2))
    assert kinds(desk.tell(e.ReplicaReady(2, PHASES))) == ["Outcome", "Dispatch"]


def test_one_more_is_wanted_where_a_replica_leaves_that_must_be_there() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", min_replicas=1))
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.join(node("n1"))
    assert kinds(desk.tell(e.Drain("n0", True))) == ["Decided", "Reserve"]


def test_who_finds_no_other_place_waits_until_it_is_taken_back(desk: Desk) -> None:
    desk.tell(e.Drain("n0", True))
    assert desk.ask(2, "a") == []
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tell(e.Unloaded(1)) == []
    state = desk.machine.state
    assert views.model(state, desk.machine.policy, state.models["a"], desk.now).estimate_s == float("inf")
    assert kinds(desk.tell(e.Drain("n0", False))) == ["Decided", "Reserve"]


def test_it_stays_so_over_a_link_that_breaks(desk: Desk) -> None:
    desk.tell(e.Drain("n0", True))
    desk.tell(e.NodeLost("n0"))
    held = (e.HeldReplica(1, D0, "a", "sha-a", "auto"),)
    assert desk.join(held=held) == [c.Unload(1, D0)]
    assert desk.machine.state.devices[D0].drained


def test_a_node_that_is_not_there_may_be_drained_before_it_comes() -> None:
    desk = Desk(QUIET)
    desk.tell(e.Drain("n0", True))
    desk.join()
    desk.tell(deploy("a"))
    assert desk.ask(1, "a") == []
    desk.tell(e.Drain("n1", False))
    assert kinds(desk.tell(e.Drain("n0", False))) == ["Decided", "Reserve"]


def test_a_node_that_was_not_drained_and_is_taken_back_goes_on(desk: Desk) -> None:
    assert desk.tell(e.Drain("n0", False)) == []
    assert desk.machine.state.replicas[1].retiring == ""


def test_what_is_unloading_already_is_told_once(desk: Desk) -> None:
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    assert desk.tell(e.Drain("n0", True)) == []
