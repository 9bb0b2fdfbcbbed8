"""More models than room: requests are served model by model, waits are bounded, nobody starves."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import FinishReason
from tests.unit.cluster.cast import GIB
from tests.unit.cluster.desk import D0, QUIET, STILL, Desk, deploy, kinds, node
from tests.unit.cluster.driver import World

DONE = FinishReason.STOP


@pytest.fixture
def world() -> World:
    """One device that holds one of the models `a` and `b`, each of which loads in 0.4 s and answers in 0.1 s."""
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a")
    world.deploy("b")
    return world


def closed_loop(world: World, model: str, count: int) -> Callable[[], None]:
    """A client that asks again when it has its answer."""

    def ask(left: int = count) -> None:
        if left:
            world.request(model, tokens=9, then=lambda: ask(left - 1))

    return ask


def test_two_clients_in_turn_cause_at_most_four_loads(world: World) -> None:
    world.at(0.0, closed_loop(world, "a", 20))
    world.at(0.01, closed_loop(world, "b", 20))
    while len(world.clients) < 40 or world.open():
        world.run(0.25)
    assert len(world.loads) <= 4
    assert Counter(client.end for client in world.clients.values()) == {"done": 40}


def test_alternating_arrivals_cause_at_most_four_loads(world: World) -> None:
    for number in range(40):
        world.at(number * 0.05, partial(world.request, "ab"[number % 2], tokens=9))
    world.run(2.0)
    world.run_until_answered(30.0)
    assert len(world.loads) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_the_wait_for_a_place_is_bounded(names: str) -> None:
    """However many are asked for all the time: each waits for the others' patience, longest answers and loads."""
    world = World()
    world.add_node(budget=GIB)
    for name in names:
        world.deploy(name)
        for client in range(2):
            world.at(client * 0.03, closed_loop(world, name, 400))
    world.run(90.0)
    policy = world.machine.policy
    bound = (len(names) - 1) * (policy.patience_cap_s + 0.5 + 0.5) + 0.5
    assert max(world.took(sequence) for sequence in world.clients if world.clients[sequence].end) <= bound
    assert all(world.now - world.clients[sequence].arrived <= bound for sequence in world.open())


def test_an_idle_replica_past_its_hold_leaves_at_once(world: World) -> None:
    world.request("a")
    world.run(2.0)
    sequence = world.request("b")
    world.run_until_answered()
    assert world.took(sequence) < 0.6
    assert world.clients[sequence].dispatches[0].queue_s < 0.5


def test_fifty_waiters_of_one_cold_model_read_its_bytes_once() -> None:
    world = World()
    world.add_node(devices=2, budget=GIB)
    world.deploy("a")
    for _ in range(50):
        world.request("a")
    world.run_until_answered(10.0)
    assert world.reads == {"sha-a": 700 << 20}
    assert len(world.loads) == 1


@pytest.mark.slow
def test_a_hundred_names_on_two_devices_are_all_answered() -> None:
    world = World(seed=3)
    world.add_node(devices=2, budget=2 * GIB)
    for number in range(100):
        world.deploy(f"m{number}", size=400 << 20)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(100)))
    when = 0.0
    for _ in range(1000):
        when += world.chance.expovariate(10)
        rank = bisect.bisect(weights, world.chance.random() * weights[-1])
        world.at(when, partial(world.request, f"m{rank}", tokens=20))
    world.run(when + 0.1)
    world.run_until_answered(30.0)
    assert Counter(client.end for client in world.clients.values()) == {"done": 1000}
    assert max(world.took(sequence) for sequence in world.clients) < 5.0


@pytest.mark.slow
def test_an_idle_server_of_a_hundred_models_only_hears_its_agents() -> None:
    world = World()
    world.add_node(devices=2)
    for number in range(100):
        world.deploy(f"m{number}")
    world.request("m1")
    world.run(400.0)
    before, said = world.events, len(world.said)
    world.run(100.0)
    reports = 100 + 2 * 200  # a heartbeat a second, and two workers' progress
    assert world.events - before <= reports + 25  # and one look each five seconds at who fell silent
    assert {type(one) for one in world.said[said:]} == {c.WakeAt}


# --- by the command ---


@pytest.fixture
def desk() -> Desk:
    """`a` is in steady use on the only device since second 0; `b` waits since then."""
    desk = Desk(STILL)
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    return desk


def test_a_model_in_use_is_drained_when_patience_ends(desk: Desk) -> None:
    assert kinds(desk.ask(3, "a")) == ["Dispatch"]
    assert desk.tick(1.9) == []
    assert kinds(desk.ask(4, "a")) == ["Dispatch"]
    assert desk.tick(0.1) == []
    assert desk.ask(5, "a") == []
    for sequence in (1, 3):
        assert desk.tell(e.SequenceDone(sequence, 1, DONE, 3)) == []
    out = desk.tell(e.SequenceDone(4, 1, DONE, 3), after=1.0)
    assert kinds(out) == ["Decided", "Evicted", "Unload"]
    assert list(desk.machine.state.models["a"].switches) == [3.0]
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 2, 90)]


def test_patience_begins_when_the_other_is_loaded() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    desk.tell(deploy("b"))
    desk.ask(1, "a")
    desk.ask(2, "b")
    desk.tick(3.0)
    desk.bring_up(1)
    desk.tick(1.9)
    assert desk.machine.state.replicas[1].draining_for == ""
    desk.tick(0.1)
    assert desk.machine.state.replicas[1].draining_for == "b"


def test_whoever_is_drained_stays_chosen() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, size=30)
    desk.serve("b", 2, size=30)
    desk.tell(deploy("x", size=30))
    desk.ask(3, "x")
    desk.tick(2.0)
    assert [replica.draining_for for replica in desk.machine.state.replicas.values()] == ["x", ""]
    desk.tell(e.Heartbeat("n0", ((D0, 1, (1, 2)),), (("sha-b", 30),), ()))  # now `b` is cheaper to bring back
    desk.ask(4, "x")
    assert [replica.draining_for for replica in desk.machine.state.replicas.values()] == ["x", ""]


def test_whoever_made_room_for_nothing_serves_again(desk: Desk) -> None:
    desk.tick(2.0)
    assert desk.ask(3, "a") == []
    assert kinds(desk.tell(e.ClientGone(2))) == ["Dispatch"]


def test_patience_doubles_after_a_forced_switch_and_is_forgotten_in_time(desk: Desk) -> None:
    switches = desk.machine.state.models["a"].switches
    switches.append(-29.0)
    switches.append(0.0)
    desk.tell(e.ClientGone(2))
    desk.tick(1.5)
    desk.ask(3, "b")
    desk.tick(3.9)
    assert desk.machine.state.replicas[1].draining_for == ""
    desk.tick(0.1)
    assert desk.machine.state.replicas[1].draining_for == "b"
    assert list(switches) == [0.0]


def test_who_waits_for_the_same_place_gets_it_by_age(desk: Desk) -> None:
    desk.tell(deploy("x"))
    desk.tick(1.0)
    desk.ask(3, "x")
    desk.tick(1.0)
    desk.tick(1.0)
    assert desk.machine.state.replicas[1].draining_for == "b"
    out = desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert [one.model for one in out if isinstance(one, c.Decided)] == ["b"]


def test_a_free_place_elsewhere_ends_the_drain(desk: Desk) -> None:
    desk.tick(2.0)
    assert desk.ask(3, "a") == []
    out = desk.join(node("n1"))
    assert kinds(out) == ["Decided", "Reserve", "Dispatch"]
    assert [one.sequence for one in out if isinstance(one, c.Dispatch)] == [3]


def test_a_drained_replica_that_is_lost_leaves_no_trace(desk: Desk) -> None:
    desk.tick(2.0)
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.tell(e.WorkerUp(D0, 2))
    assert [one.model for one in desk.machine.state.replicas.values()] == ["a"]  # the elder waiter first
    assert desk.machine.state.models["b"].drains == ()
