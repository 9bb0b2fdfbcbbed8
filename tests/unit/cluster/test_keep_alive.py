"""Keep-alive and scale to zero."""

from __future__ import annotations

import math

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import FinishReason
from tests.unit.cluster.desk import D0, QUIET, Desk, deploy, kinds

DONE = FinishReason.STOP


@pytest.mark.parametrize(("spec", "override", "left"), [(5.0, None, 5.0), (5.0, 2.0, 2.0), (math.inf, 1.0, 1.0)])
def test_an_idle_replica_leaves_after_its_keep_alive(spec: float, override: float | None, left: float) -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", keep_alive=spec))
    desk.ask(1, "a", keep_alive=override)
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3), after=60.0)
    assert desk.tick(left - 0.1) == []
    assert desk.tick(0.1) == [c.Evicted(1, "a", D0, "keep-alive"), c.Unload(1, D0)]
    desk.tell(e.Unloaded(1))
    assert desk.machine.state.replicas == {}
    assert desk.machine.state.devices[D0].actual.used == 0


def test_keep_alive_zero_unloads_with_the_last_sequence() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=0.0)
    desk.ask(2, "a")
    assert desk.tell(e.SequenceDone(1, 1, DONE, 3)) == []
    assert kinds(desk.tell(e.SequenceDone(2, 1, DONE, 3))) == ["Evicted", "Unload"]


@pytest.mark.parametrize("spec", [{"keep_alive": math.inf}, {"pinned": True}, {"min_replicas": 1}])
def test_some_replicas_stay_for_ever(spec: dict[str, object]) -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", **{"keep_alive": 1.0, **spec}))  # type: ignore[arg-type]
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tick(1e6) == []


def test_a_replica_with_a_request_on_its_way_stays() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=1.0)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.RequestArrived(2, "a", "sha-a"), after=0.9)
    assert desk.tick(5.0) == []
    assert kinds(desk.tell(e.ClientGone(2))) == ["Evicted", "Unload"]


@pytest.mark.parametrize("first", ["request", "tick"])
def test_a_request_in_the_tick_of_the_expiry_is_served(first: str) -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=5.0)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    if first == "tick":
        assert kinds(desk.tick(5.0)) == ["Evicted", "Unload"]
        assert "StartLoad" not in kinds(desk.ask(2, "a"))  # what leaves has still its place
        desk.tell(e.Unloaded(1))
        desk.bring_up(2)
    else:
        desk.now += 5.0
        assert "Unload" not in kinds(desk.ask(2, "a"))
        assert desk.tick(0.0) == []
    assert any(2 in replica.running for replica in desk.machine.state.replicas.values())


def test_a_use_puts_the_keep_alive_off() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=5.0)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tick(4.0)
    desk.ask(2, "a")
    assert desk.tick(4.0) == []
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert desk.tick(4.9) == []


def test_a_pin_holds_a_replica_past_its_keep_alive_and_no_longer() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=10.0)
    desk.tell(e.Pin("a", True))
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tick(20.0) == []
    assert kinds(desk.tell(e.Pin("a", False))) == ["Evicted", "Unload"]


@pytest.mark.parametrize(("old", "new"), [(math.inf, 5.0), (300.0, 5.0), (1.0, 5.0)])
def test_a_deploy_with_another_keep_alive_counts_for_what_is_loaded(old: float, new: float) -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=old)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tell(deploy("a", keep_alive=new)) == []
    assert desk.tick(new - 0.1) == []
    assert desk.tick(0.1) == [c.Evicted(1, "a", D0, "keep-alive"), c.Unload(1, D0)]


def test_a_deploy_that_keeps_what_is_loaded_for_ever_puts_no_end_to_it() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, keep_alive=5.0)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(deploy("a", keep_alive=math.inf))
    assert desk.tick(1e6) == []


def test_a_deploy_with_the_same_keep_alive_leaves_what_a_request_wished() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", keep_alive=5.0))
    desk.ask(1, "a", keep_alive=60.0)
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(deploy("a", keep_alive=5.0, max_concurrency=2))
    assert desk.tick(59.9) == []
    assert kinds(desk.tick(0.1)) == ["Evicted", "Unload"]
