"""What the policy promises, by what the machine does with its defaults."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.failures import convict, fail
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import DeviceSpec, Footprint, ModelSpec, NodeSpec
from tests.unit.cluster.desk import D0, QUIET, Desk, deploy, kinds

GB = 10**9


@pytest.fixture
def desk() -> Desk:
    desk = Desk(QUIET)
    desk.join()
    return desk


def test_a_model_that_fails_again_and_again_is_left_alone_for_a_minute_at_most(desk: Desk) -> None:
    desk.tell(deploy("a"))
    model = desk.machine.state.models["a"]
    pauses = []
    for _ in range(8):
        fail(Turn(desk.machine.state, desk.machine.policy, 0.0), model, "broken", permanent=False)
        pauses.append(model.cool_until)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_one_that_ends_engine_processes_for_an_hour_at_most(desk: Desk) -> None:
    desk.tell(deploy("a"))
    model = desk.machine.state.models["a"]
    pauses = []
    for _ in range(8):
        convict(Turn(desk.machine.state, desk.machine.policy, 0.0), model, 3)
        pauses.append(model.cool_until)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]


@pytest.mark.parametrize(("bandwidth", "limit"), [(1000.0, 10.0), (40.0, 20 * 2.05)])
def test_a_load_may_take_twenty_times_as_long_as_predicted_and_ten_seconds(bandwidth: float, limit: float) -> None:
    desk = Desk(QUIET)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"),), {"disk": bandwidth}))
    desk.tell(deploy("a", size=80))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    assert desk.tick(limit - 0.01) == []
    assert "Unload" in kinds(desk.tick(0.02))


@pytest.mark.parametrize(("weights", "seconds"), [(2 * GB, 2.05), (20 * GB, 4.05)], ids=["disk", "upload"])
def test_an_unknown_node_is_thought_to_have_a_modest_disk_and_link(weights: int, seconds: float) -> None:
    desk = Desk()
    desk.join(NodeSpec("n0", 100 * GB, (DeviceSpec(0, "cpu", 40 * GB, "copy"),)))
    desk.tell(e.Deploy(ModelSpec("a", "/a"), Footprint("sha-a", 2 * GB, weights, 1 << 16, 4096)))
    decided, _ = desk.tell(e.RequestArrived(1, "a", "sha-a"))
    assert isinstance(decided, c.Decided)
    assert decided.predicted_s == seconds


@pytest.mark.parametrize(("context", "tokens"), [(8192, 2048), (1024, 1024)])
def test_a_replica_is_promised_kv_for_a_sequence_of_2048_tokens(context: int, tokens: int) -> None:
    desk = Desk()
    desk.join(NodeSpec("n0", 100 * GB, (DeviceSpec(0, "cpu", 40 * GB, "copy"),)))
    footprint = Footprint("sha-a", GB, GB, 1 << 16, context)
    desk.tell(e.Deploy(ModelSpec("a", "/a"), footprint))
    _, reserve = desk.tell(e.RequestArrived(1, "a", "sha-a"))
    assert isinstance(reserve, c.Reserve)
    assert reserve.bytes == GB + footprint.kv_bytes(tokens)
