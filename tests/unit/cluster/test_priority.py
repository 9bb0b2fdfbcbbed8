"""Whose bytes go first: loads that somebody waits for, before those that nobody does."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceId
from tests.unit.cluster.desk import D0, D1, PHASES, STILL, Desk, decided, deploy, kinds, node


def two() -> Desk:
    """A node of two devices that reads ten bytes a second."""
    desk = Desk(STILL)
    desk.join(node(devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    return desk


def loading(desk: Desk, replica: int) -> c.StartLoad:
    (started,) = desk.tell(e.Reserved(desk.machine.state.replicas[replica].device, replica))
    assert isinstance(started, c.StartLoad)
    return started


def test_a_load_that_somebody_waits_for_is_online() -> None:
    desk = two()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(deploy("b", min_replicas=1))
    assert [loading(desk, 1).online, loading(desk, 2).online] == [True, False]


def test_a_request_hastens_the_load_that_it_finds_once() -> None:
    desk = two()
    desk.tell(deploy("a", min_replicas=1))
    loading(desk, 1)
    assert desk.tell(e.RequestArrived(1, "a", "sha-a")) == [c.Hasten(1, D0)]
    assert "Hasten" not in kinds(desk.ask(2, "a"))


def test_a_request_before_the_load_makes_it_online_without_a_word() -> None:
    desk = two()
    desk.tell(deploy("a", min_replicas=1))
    assert "Hasten" not in kinds(desk.ask(1, "a"))
    assert loading(desk, 1).online


def test_an_online_start_does_not_wait_for_what_nobody_waits_for() -> None:
    desk = two()
    desk.tell(deploy("a", min_replicas=1))
    desk.tell(deploy("b"))
    assert round(decided(desk.ask(1, "b")).predicted_s, 6) == 8.05


def test_a_start_that_nobody_waits_for_waits_for_all() -> None:
    desk = two()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    assert round(decided(desk.tell(deploy("b", min_replicas=1))).predicted_s, 6) == 16.05
    desk = two()
    desk.tell(deploy("a", min_replicas=1))
    assert round(decided(desk.tell(deploy("b", min_replicas=1))).predicted_s, 6) == 16.05


@pytest.mark.parametrize(("waits", "place"), [(True, D1), (False, DeviceId("n1", 0))])
def test_a_place_is_chosen_by_what_goes_before_its_bytes(waits: bool, place: DeviceId) -> None:
    """Beside a load that nobody waits for, or on a node whose disk is slower."""
    desk = two()
    desk.join(node("n1"))
    desk.machine.state.nodes["n1"].bandwidth["disk"] = 8.0
    desk.tell(deploy("a", min_replicas=1))
    desk.tell(deploy("b", min_replicas=int(not waits)))
    if waits:
        desk.tell(e.RequestArrived(1, "b", "sha-b"))
    assert desk.machine.state.replicas[2].device == place
    assert desk.machine.state.replicas[2].online == waits


def test_what_nobody_waits_for_has_read_of_a_checkpoint_is_there_for_who_does() -> None:
    desk = two()
    desk.tell(deploy("a", checkpoint="same", min_replicas=1))
    desk.tell(deploy("b", checkpoint="same"))
    loading(desk, 1)
    desk.tell(e.LoadProgress(1, 70, 80))
    assert round(decided(desk.ask(1, "b")).predicted_s, 6) == 1.05


def overtaken() -> tuple[Desk, float]:
    """A load that nobody waits for, and one that goes before it; seconds after which the first would count as stuck."""
    desk = two()
    desk.tell(deploy("a", min_replicas=1))
    loading(desk, 1)
    desk.tell(deploy("b"))
    desk.ask(1, "b")
    assert desk.machine.state.replicas[2].device == D1
    loading(desk, 2)
    return desk, desk.machine.policy.load_factor * desk.machine.state.replicas[1].predicted_s


def test_a_load_that_others_go_before_has_not_got_stuck() -> None:
    desk, limit = overtaken()
    desk.tell(e.LoadProgress(2, 1, 80), after=limit - 1)
    assert desk.tick(1.0) == []
    desk.tell(e.ReplicaReady(2, PHASES))
    assert "Unload" in kinds(desk.tick(limit + 1))


def test_when_those_before_it_have_ended_its_time_begins() -> None:
    desk, limit = overtaken()
    desk.tell(e.ReplicaReady(2, PHASES), after=limit - 1)
    assert desk.tick(limit - 1) == []
    assert "Unload" in kinds(desk.tick(2))


def test_a_load_that_is_hastened_has_its_time_before_it() -> None:
    desk, limit = overtaken()
    desk.tell(e.LoadProgress(2, 1, 80), after=limit - 1)
    assert "Hasten" in kinds(desk.tell(e.RequestArrived(2, "a", "sha-a")))
    assert desk.tick(limit - 1) == []
    assert "Unload" in kinds(desk.tick(2))


def standing() -> tuple[Desk, float]:
    """A load that nobody waits for, of three on a node, that has been still for all of its time but three seconds."""
    desk = Desk(STILL)
    desk.join(node(devices=3))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    desk.tell(deploy("a", min_replicas=1))
    loading(desk, 1)
    limit = desk.machine.policy.load_factor * desk.machine.state.replicas[1].predicted_s
    assert desk.tick(limit - 3) == []
    return desk, limit


def test_a_load_has_the_rest_of_its_time_after_those_that_went_before_it() -> None:
    desk, limit = standing()
    for number, name in ((2, "b"), (3, "c")):
        desk.tell(deploy(name))
        desk.ask(number, name)
        loading(desk, number)
        desk.tell(e.LoadProgress(2, number, 80), after=limit - 1)
    assert "Unload" not in kinds(desk.tell(e.ReplicaReady(2, PHASES)))
    desk.tell(e.LoadProgress(3, 1, 80), after=4)
    assert "Unload" not in kinds(desk.tell(e.ReplicaReady(3, PHASES)))
    assert desk.tick(2.9) == []
    assert "Unload" in kinds(desk.tick(0.2))


def test_a_load_has_all_of_its_time_after_news_of_it() -> None:
    desk, limit = standing()
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    loading(desk, 2)
    desk.tell(e.LoadProgress(1, 1, 80), after=5)
    desk.tell(e.ReplicaReady(2, PHASES), after=5)
    assert desk.tick(limit - 0.1) == []
    assert "Unload" in kinds(desk.tick(0.2))


def test_its_time_stands_still_too_when_another_is_hastened() -> None:
    desk, limit = standing()
    desk.tell(deploy("b", min_replicas=1))
    loading(desk, 2)
    assert desk.tick(1) == []
    assert "Hasten" in kinds(desk.tell(e.RequestArrived(1, "b", "sha-b")))
    desk.tell(e.ReplicaReady(2, PHASES), after=limit - 1)
    assert desk.tick(1.9) == []
    assert "Unload" in kinds(desk.tick(0.2))


def test_an_online_load_gains_no_time_when_another_ends() -> None:
    desk, _ = standing()
    for number, name in ((2, "b"), (3, "c")):
        desk.tell(deploy(name))
        desk.ask(number, name)
        loading(desk, number)
    limit = desk.machine.policy.load_factor * desk.machine.state.replicas[3].predicted_s
    desk.tell(e.ReplicaReady(2, PHASES), after=limit - 1)
    assert c.Unload(3, DeviceId("n0", 2)) in desk.tick(1.1)
