"""What those who watch are told, from the events and commands of a real machine."""

from __future__ import annotations

from typing import Any

import pytest

from serverless_llm.cluster import commands, events
from serverless_llm.cluster.state import State
from serverless_llm.domain import DeviceId, DeviceSpec, Footprint, LoadPhases, ModelSpec, NodeSpec
from serverless_llm.node import news
from tests.unit.cluster.desk import Desk, deploy

DEVICE = DeviceId("n0", 1)
DEPLOY = events.Deploy(ModelSpec("m", "/models/m"), Footprint("c", 1, 1, 1, 16))
PHASES = LoadPhases(queue_s=0.1, disk_s=0.5, upload_s=0.2, total_s=0.8, disk_bytes=7)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (DEPLOY, {"event": "deployed", "model": "m", "source": "/models/m", "url": "", "replaces": False}),
        (events.Delete("m"), {"event": "deleted", "model": "m"}),
        (events.Pin("m", True), {"event": "pinned", "model": "m", "pinned": True}),
        (events.Drain("n0", False), {"event": "drained", "node": "n0", "drained": False}),
        (events.NodeJoined(NodeSpec("n0", 1, (DeviceSpec(0, "cpu", 1, "view"),)), (), (), ()),
         {"event": "agent_joined", "node": "n0", "devices": 1}),
        (events.NodeLost("n0"), {"event": "agent_lost", "node": "n0"}),
        (events.WorkerUp(DEVICE, 2), {"event": "worker_up", "device": "n0/1", "incarnation": 2}),
        (events.WorkerLost(DEVICE, 2, "killed"),
         {"event": "worker_lost", "device": "n0/1", "incarnation": 2, "cause": "killed"}),
        (events.LoadFailed(99, "nobody's", True), None),
        (events.Tick(), None),
    ],
)  # fmt: skip
def test_events(event: events.Event, told: dict[str, Any] | None) -> None:
    assert news.of_event(event, State()) == told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (commands.Decided(3, "m", DEVICE, 1.23456, (1, 2)),
         {"event": "load_decided", "predicted_s": 1.2346, "victims": [1, 2]}),
        (commands.StartLoad(3, DEVICE, "m", "/models/m", "c", "auto", 0), {"event": "load_started"}),
        (commands.Outcome(3, "m", DEVICE, 1.0, 0.9, PHASES),
         {"event": "load_ready", "predicted_s": 1.0, "actual_s": 0.9, "queue_s": 0.1, "remote_s": 0.0, "disk_s": 0.5,
          "upload_s": 0.2, "source": "disk"}),
        (commands.Evicted(3, "m", DEVICE, "memory"), {"event": "evicted", "reason": "memory"}),
    ],
)  # fmt: skip
def test_decisions(command: commands.Command, told: dict[str, Any]) -> None:
    assert news.of_command(command) == told | {"model": "m", "replica": 3, "device": "n0/1"}


def test_a_sequence_that_is_given_back() -> None:
    told = news.of_command(commands.GivenBack(7, "m", DEVICE, "no room"))
    assert told == {"event": "given_back", "model": "m", "device": "n0/1", "why": "no room"}


def test_what_is_no_news() -> None:
    assert news.of_command(commands.WakeAt(1.0)) is None


def test_a_load_that_fails_names_its_model() -> None:
    desk = Desk()
    desk.join()
    desk.tell(deploy("m"))
    desk.ask(1, "m")
    (number,) = desk.machine.state.replicas
    told = news.of_event(events.LoadFailed(number, "no config.json", True), desk.machine.state)
    assert told == {
        "event": "load_failed",
        "model": "m",
        "replica": number,
        "device": "n0/0",
        "error": "no config.json",
        "permanent": True,
    }
