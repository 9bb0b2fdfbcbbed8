"""Poison in a whole cluster: what it costs its neighbours."""

from __future__ import annotations

import pytest

from tests.unit.cluster.cast import GIB
from tests.unit.cluster.driver import World


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("after", [0.0, 0.1, 1.0, 5.0, 30.0])
def test_a_request_that_always_kills_costs_three_workers_and_no_healthy_stream(devices: int, after: float) -> None:
    """Whatever it generates before it does."""
    world = World(seed=round(10 * after))
    world.add_node(devices=devices, budget=GIB)
    world.deploy("a", max_replicas=2, context=16384)
    world.deploy("b", size=100 << 20)
    healthy = [world.request(name, tokens=400) for name in "aaaaaaab"]
    world.run(1.0)
    poison = world.request("a", tokens=10_000)
    world.poison[poison] = after
    world.run(0.1)
    healthy += [world.request(name, tokens=40) for name in "aabb"]
    world.run_until_answered(600.0)
    assert world.deaths == 3
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert world.clients[poison].end == "500 engine_error"


def test_a_checkpoint_that_always_kills_costs_three_workers_and_no_healthy_stream() -> None:
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a")
    world.deploy("bad", size=100 << 20)
    world.poison_models.add("bad")
    healthy = [world.request("a", tokens=400) for _ in range(8)]
    world.run(1.0)
    asked = [world.request("bad") for _ in range(3)]
    world.run_until_answered(60.0)
    assert world.deaths == 3
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert {world.clients[sequence].end for sequence in asked} == {"503 model_load_failed"}
    assert world.machine.state.models["bad"].error == "loading bad ended the engine process 3 times"
    assert {world.clients[world.request("a")].end for _ in range(3)} == {""}
    world.run_until_answered(5.0)


def test_a_poisonous_request_and_checkpoint_at_once() -> None:
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a")
    world.deploy("bad", size=100 << 20)
    world.poison_models.add("bad")
    healthy = [world.request("a", tokens=300) for _ in range(4)]
    world.run(1.0)
    world.poison[world.request("a")] = 0.0
    world.request("bad")
    world.run_until_answered(60.0)
    assert {world.clients[sequence].end for sequence in healthy} == {"done"}
    assert world.deaths <= 6


def test_room_is_made_for_the_kv_of_a_suspect() -> None:
    world = World()
    world.add_node(budget=GIB)
    world.deploy("a", size=300 << 20)
    world.deploy("beside", size=300 << 20)
    suspect = world.request("a", tokens=1000, kv=500 << 20)
    (worker,) = world.agents["n0"].workers.values()
    for _ in range(2):
        world.run(3.0)
        world.kill(world.agents["n0"], worker)
    world.request("beside")
    world.run_until_answered(60.0)
    assert world.clients[suspect].end == "done"
