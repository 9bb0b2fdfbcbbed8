"""The machine behind links that drop, delay, double and reorder, on nodes and workers that die.

After every event the machine's invariants are checked by name, and the world's: one owner per epoch, exactly one
terminal event per request, nothing busy, loading or pinned evicted. When faults stop, every request ends.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from tests.unit.cluster.cast import GIB, Agent, Faults, Worker
from tests.unit.cluster.driver import World

MODELS = ("a", "b", "c", "d", "e")
NODES = ("n0", "n1")
SIZES = {"base": 130 << 20, "head": 40 << 20, "tail": 20 << 20}
CONTENTS: dict[str, tuple[str, ...]] = {
    "a": ("base", "head"), "b": ("base", "tail"), "c": ("base", "head", "tail"), "d": ("tail",), "e": ()
}  # fmt: skip
ROUGH = Faults(drop=0.03, duplicate=0.05, delay_s=1.5)
CALM_S = 400.0  # after the last fault every request has ended within this, deadlines of 30 s on the way included
# Deadlines short enough that many expire in a run; their order stays that of the defaults.
POLICY = Policy(
    dispatch_s=4.0, reserve_s=8.0, unload_s=8.0, kill_s=3.0, mention_s=8.0, load_floor_s=4.0, abandon_after=5.0
)


def build(seed: int, weights: str) -> World:
    world = World(POLICY, seed=seed)
    world.add_node("n0", devices=2, budget=GIB, weights=weights, dram=2 * GIB)
    world.add_node("n1", devices=2, budget=5 * GIB // 4, weights=weights, dram=5 * GIB // 4)
    world.sizes = SIZES
    for number, name in enumerate(MODELS):
        size = (200 + 150 * number) << 20
        world.deploy(
            name,
            size=size,
            contents=CONTENTS[name],
            max_replicas=1 + number % 2,
            max_concurrency=3,
            keep_alive=(0.0, 2.0, 60.0)[number % 3],
        )
    return world


def settle(world: World) -> None:
    """The faults stop; every request ends, every node is seen, nothing is left over."""
    world.faults = Faults()
    world.refusing.clear()
    world.stuck.clear()
    for agent in world.agents.values():
        agent.cut = False
        world.after(0.1, lambda agent=agent: world.connect(agent))  # type: ignore[misc]
    world.run_until_answered(limit=CALM_S)
    world.run(45.0)
    state = world.machine.state
    assert not state.sequences, "every request ended for the machine too"
    assert sorted(state.nodes) == sorted(world.agents), "every node is back"
    assert all(device.usable and device.trial is None for device in state.devices.values()), "every worker is in use"
    there = {one for agent in world.agents.values() for worker in agent.workers.values() for one in worker.replicas}
    assert there == set(state.replicas), "the machine knows what the workers hold"
    for agent in world.agents.values():
        for worker in agent.workers.values():
            for name in worker.loading:  # those that are stuck for ever, of a former link
                worker.extents.pop(name)
                worker.taken.pop(name)
            ledger = state.devices[worker.device].actual
            assert worker.used(SIZES) == ledger.used, "the ledger counts what is shared once, as the worker does"
    ends = Counter(client.end for client in world.clients.values())
    assert not ends[""]


class Storm(RuleBasedStateMachine):
    """Hypothesis chooses what happens; the world answers in virtual time."""

    @initialize(seed=st.integers(0, 999), weights=st.sampled_from(["view", "copy"]))
    def begin(self, seed: int, weights: str) -> None:
        self.world = build(seed, weights)

    def agent(self, number: int) -> Agent:
        return self.world.agents[NODES[number % len(NODES)]]

    def worker(self, number: int) -> tuple[Agent, Worker]:
        agent = self.agent(number)
        return agent, agent.workers[number // 2 % 2]

    @rule(model=st.sampled_from(MODELS), tokens=st.integers(1, 200), count=st.integers(1, 5))
    def ask(self, model: str, tokens: int, count: int) -> None:
        for _ in range(count):
            self.world.request(model, tokens=tokens)

    @rule(model=st.sampled_from(MODELS), kv=st.integers(1, 1100))
    def ask_for_much_kv(self, model: str, kv: int) -> None:
        self.world.request(model, tokens=50, kv=kv << 20)

    @rule(number=st.integers(0, 99), model=st.sampled_from(MODELS), after=st.sampled_from([0.0, 0.1, 1.0]))
    def ask_poisonously(self, number: int, model: str, after: float) -> None:
        if number < 15:
            self.world.poison[self.world.request(model, tokens=500)] = after

    @rule(number=st.integers(0, 999))
    def hang_up(self, number: int) -> None:
        waiting = self.world.open()
        if waiting:
            self.world.hang_up(waiting[number % len(waiting)])

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.3, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(rough=st.booleans())
    def change_weather(self, rough: bool) -> None:
        self.world.faults = ROUGH if rough else Faults()

    @rule(number=st.integers(0, 3))
    def kill_worker(self, number: int) -> None:
        self.world.kill(*self.worker(number))

    @rule(number=st.integers(0, 1), back_s=st.sampled_from([0.3, 4.0, 9.0]))
    def kill_node(self, number: int, back_s: float) -> None:
        self.world.kill_node(self.agent(number), back_s)

    @rule(number=st.integers(0, 1), again_s=st.sampled_from([0.1, 3.0]))
    def break_link(self, number: int, again_s: float) -> None:
        self.world.disconnect(self.agent(number), again_s)

    @rule(number=st.integers(0, 9))
    def restart_head(self, number: int) -> None:
        if number < 3:
            self.world.restart_head()

    @rule(number=st.integers(0, 1), cut=st.booleans())
    def partition(self, number: int, cut: bool) -> None:
        agent = self.agent(number)
        agent.cut = cut
        if not cut:
            self.world.after(0.1, lambda: self.world.connect(agent))

    @rule(number=st.integers(0, 3), missing=st.sampled_from([0, 100 << 20]))
    def shrink_device(self, number: int, missing: int) -> None:
        self.world.refusing[self.worker(number)[1].device] = missing

    @rule(model=st.sampled_from(MODELS), stuck=st.booleans())
    def jam_loads(self, model: str, stuck: bool) -> None:
        (self.world.stuck.add if stuck else self.world.stuck.discard)(model)

    @rule(number=st.integers(0, 1), seconds=st.sampled_from([0.1, 5.0, 20.0]))
    def drain(self, number: int, seconds: float) -> None:
        self.world.drain(NODES[number], seconds)

    @rule(model=st.sampled_from(MODELS), what=st.sampled_from(["load", "unload", "pin", "unpin", "delete", "redeploy"]))
    def operate(self, model: str, what: str) -> None:
        operate(self.world, model, what)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            settle(self.world)


def operate(world: World, model: str, what: str) -> None:
    if what in ("pin", "unpin"):
        world.handle(e.Pin(model, what == "pin"))
        world.after(5.0, lambda: world.tell(e.Pin(model, False)))  # or others could wait for ever
    elif what == "redeploy":
        known = world.machine.state.models.get(model)
        size = (200 + world.chance.randrange(600)) << 20
        spec = {} if known is None else {"min_replicas": 1 - known.spec.min_replicas if model == "a" else 0}
        contents = CONTENTS[model][: world.chance.randrange(3)]
        world.deploy(model, size=size, checkpoint=f"sha-{model}-{size}", contents=contents, max_concurrency=3, **spec)
    else:
        verbs: dict[str, type[e.Load] | type[e.UnloadModel] | type[e.Delete]]
        verbs = {"load": e.Load, "unload": e.UnloadModel, "delete": e.Delete}
        world.handle(verbs[what](model))


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=25, stateful_step_count=60)
TestStorm = pytest.mark.slow(TestStorm)


def make_trouble(trouble: Storm, chance: random.Random) -> None:
    number = chance.randrange(4)
    what = chance.choice(["load", "unload", "pin", "redeploy"])
    actions: list[Callable[[], object]] = [
        lambda: trouble.hang_up(number),
        lambda: trouble.kill_worker(number),
        lambda: trouble.kill_node(number, 2.0),
        lambda: trouble.break_link(number, 0.2),
        lambda: trouble.partition(number, number > 1),
        lambda: trouble.restart_head(number),
        lambda: trouble.change_weather(number < 2),
        lambda: trouble.shrink_device(number, number % 2 << 26),
        lambda: trouble.jam_loads(MODELS[number], number > 2),
        lambda: trouble.ask_poisonously(number, MODELS[number], number / 3),
        lambda: operate(trouble.world, MODELS[number], what),
        lambda: trouble.drain(number % 2, 5.0),
        lambda: trouble.ask_for_much_kv(MODELS[number], chance.randrange(1, 1100)),
    ]
    chance.choice(actions)()


def storm(seed: int, steps: int) -> World:
    """A long seeded run: requests all the time, now and then a fault or an operator."""
    chance = random.Random(seed)
    world = build(seed, ("view", "copy")[seed % 2])
    trouble = Storm()
    trouble.world = world
    for _ in range(steps):
        world.run(chance.expovariate(4.0))
        world.request(chance.choice(MODELS), tokens=chance.randrange(1, 120))
        if chance.random() < 0.12:
            make_trouble(trouble, chance)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_long_storms_end(seed: int) -> None:
    print("seed", seed)
    settle(storm(seed, steps=500))


SCRIPT = """
import hashlib
from tests.properties.test_machine import storm
world = storm(7, steps=120)
print(hashlib.sha256("\\n".join(world.log).encode()).hexdigest())
"""


@pytest.mark.slow
def test_one_seed_gives_one_command_log() -> None:
    digests = set()
    for hash_seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1
