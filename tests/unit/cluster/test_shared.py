"""Replicas that refer to the same bytes of a device: what the ledgers say of it, and who leaves for a start."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.ledger import extent
from serverless_llm.cluster.state import Device
from serverless_llm.domain import FinishReason
from tests.unit.cluster.desk import D0, PHASES, STILL, Desk, decided, deploy, kinds

DONE = FinishReason.STOP
Shared = tuple[tuple[int, int, int], ...]


def resident(desk: Desk, name: str, size: int, shared: Shared = ()) -> int:
    """Deploy a model and leave it idle, with extents of others; its replica."""
    state = desk.machine.state
    replica, sequence = state.next_replica, 100 + state.next_replica
    desk.tell(deploy(name, size=size))
    desk.ask(sequence, name)
    desk.tell(e.Reserved(D0, replica))
    desk.tell(e.ReplicaReady(replica, PHASES, shared))
    desk.tell(e.SequenceDone(sequence, 1, DONE, 3))
    return replica


def device(desk: Desk) -> Device:
    return desk.machine.state.devices[D0]


def used(desk: Desk) -> tuple[int, int]:
    return device(desk).planned.used, device(desk).actual.used


@pytest.fixture
def desk() -> Desk:
    """A device of 100 bytes; a replica's floor of KV takes 10."""
    desk = Desk(STILL)
    desk.join()
    return desk


def unload(desk: Desk, name: str, replica: int) -> None:
    desk.tell(e.UnloadModel(name))
    desk.tell(e.Unloaded(replica))


def test_what_two_share_counts_once_until_both_have_left(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    assert used(desk) == (40, 40)
    b = resident(desk, "b", 30, ((7, 16, a), (8, 9, a)))
    assert used(desk) == (55, 55)
    assert kinds(desk.tell(e.UnloadModel("a"))) == ["Evicted", "Unload"]
    assert used(desk) == (40, 55)
    desk.tell(e.Unloaded(a))
    assert used(desk) == (40, 40)
    unload(desk, "b", b)
    assert used(desk) == (0, 0)
    assert device(desk).actual.held == {}


def test_a_start_counts_whole_until_it_is_known_what_it_shares(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    desk.tell(deploy("b", size=30))
    desk.ask(1, "b")
    assert used(desk) == (80, 80)
    desk.tell(e.Reserved(D0, 2))
    desk.tell(e.ReplicaReady(2, PHASES, ((7, 25, a),)))
    assert used(desk) == (55, 55)
    desk.tell(deploy("c", size=35))
    assert decided(desk.ask(2, "c")).victims == ()
    assert used(desk) == (100, 100)


def test_what_was_borrowed_is_lent_on(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    b = resident(desk, "b", 30, ((7, 16, a), (8, 4, a)))
    unload(desk, "a", a)
    c_ = resident(desk, "c", 30, ((8, 4, b), (9, 5, b)))
    assert used(desk) == (71, 71)
    assert device(desk).replicas[b].shared == (extent(7, 16), extent(8, 4), extent(9, 5))
    assert device(desk).replicas[c_].shared == (extent(8, 4), extent(9, 5))
    unload(desk, "b", b)
    assert used(desk) == (40, 40)


def test_extents_of_who_left_meanwhile_are_the_borrowers(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    desk.tell(deploy("b", size=30))
    desk.ask(1, "b")
    desk.tell(e.Reserved(D0, 2))
    desk.tell(e.UnloadModel("a"))
    assert used(desk) == (40, 80)
    desk.tell(e.ReplicaReady(2, PHASES, ((7, 25, a),)))
    assert used(desk) == (40, 55)
    desk.tell(e.Unloaded(a))
    assert used(desk) == (40, 40)
    gone = resident(desk, "c", 30, ((8, 5, a),))
    assert used(desk) == (80, 80)
    assert device(desk).replicas[gone].shared == (extent(8, 5),)


def test_what_leaves_alone_frees_what_is_its_own(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    b = resident(desk, "b", 30, ((7, 25, a),))
    desk.tick(100.0)
    desk.tell(deploy("x", size=50))
    out = desk.tell(e.RequestArrived(1, "x", "sha-x"))
    assert decided(out).victims == (a,)  # 45 are free, it has 15
    assert desk.tell(e.Unloaded(a)) == [c.Reserve(D0, 3, 60)]
    assert used(desk) == (100, 100)
    assert b in device(desk).replicas


def test_both_leave_where_neither_frees_enough(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    b = resident(desk, "b", 30, ((7, 25, a),))
    desk.tick(100.0)
    desk.tell(deploy("x", size=50 + 15))
    assert decided(desk.tell(e.RequestArrived(1, "x", "sha-x"))).victims == (a, b)
    assert used(desk)[0] == 75


@pytest.mark.parametrize("size", [76, 90])
def test_what_is_shared_goes_with_all_who_share_it(desk: Desk, size: int) -> None:
    a = resident(desk, "a", 30)
    b = resident(desk, "b", 30, ((7, 25, a),))
    desk.tick(100.0)
    desk.tell(deploy("x", size=size))
    assert decided(desk.tell(e.RequestArrived(1, "x", "sha-x"))).victims == (a, b)


def test_who_shares_with_one_that_stays_frees_no_more_than_its_own(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    resident(desk, "b", 30, ((7, 25, a),))
    desk.ask(1, "b")
    desk.tick(100.0)
    desk.tell(deploy("x", size=51))
    assert desk.tell(e.RequestArrived(2, "x", "sha-x")) == []


def test_who_shares_nothing_stays_where_sharers_suffice(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    b = resident(desk, "b", 30, ((7, 29, a),))
    resident(desk, "c", 10)
    desk.tick(100.0)
    desk.tell(deploy("x", size=68))
    assert decided(desk.tell(e.RequestArrived(1, "x", "sha-x"))).victims == (a, b)


def test_who_shares_with_two_ties_them_together(desk: Desk) -> None:
    a, b = resident(desk, "a", 20), resident(desk, "b", 20)
    c_ = resident(desk, "c", 20, ((7, 15, a), (8, 4, b)))
    assert used(desk) == (71, 71)
    desk.tick(100.0)
    desk.tell(deploy("x", size=90))
    assert decided(desk.tell(e.RequestArrived(1, "x", "sha-x"))).victims == (a, c_, b)


@pytest.mark.parametrize(("shared", "adopted"), [(20, True), (19, False)])
def test_what_is_shared_is_adopted_as_such(shared: int, adopted: bool) -> None:
    desk = Desk(STILL)
    for name in ("a", "b"):
        desk.tell(deploy(name, size=50))
    names = ((1, "a"), (2, "b"))
    held = tuple(e.HeldReplica(number, D0, name, f"sha-{name}", "auto", ((7, shared),)) for number, name in names)
    assert desk.join(held=held) == ([] if adopted else [c.Unload(2, D0)])
    assert used(desk) == ((100, 100) if adopted else (60, 60))


def test_what_a_worker_shared_is_free_when_it_is_lost(desk: Desk) -> None:
    a = resident(desk, "a", 30)
    resident(desk, "b", 30, ((7, 25, a),))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert used(desk) == (0, 0)
