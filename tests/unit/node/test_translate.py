"""Messages as events, commands as messages."""

from __future__ import annotations

import pytest

from serverless_llm import wire
from serverless_llm.cluster import commands, events
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, LoadPhases, NodeSpec, WorkClass
from serverless_llm.node import translate

DEVICE = DeviceId("n", 1)
PHASES = LoadPhases(0.1, 0.2, 0.3, 0.6, 10, 20, 30, 0.4, 40)

FROM_NODE: list[tuple[wire.Message, list[events.Event]]] = [
    (wire.Reserved(1, 5), [events.Reserved(DEVICE, 5)]),
    (wire.Refused(1, 5, 77), [events.Refused(DEVICE, 5, 77)]),
    (wire.LoadProgress(5, 1, 2), [events.LoadProgress(5, 1, 2)]),
    (wire.ReplicaReady(5, 0.1, 0.2, 0.3, 0.6, 10, 20, 30, 0.4, 40), [events.ReplicaReady(5, PHASES)]),
    (
        wire.ReplicaReady(5, 0.1, 0.2, 0.3, 0.6, 10, 20, 30, 0.4, 40, [(7, 100, 4)]),
        [events.ReplicaReady(5, PHASES, ((7, 100, 4),))],
    ),
    (wire.LoadFailed(5, "why", True), [events.LoadFailed(5, "why", True)]),
    (wire.Unloaded(5), [events.Unloaded(5)]),
    (wire.WorkerUp(1, 3, 99, "id"), [events.WorkerUp(DEVICE, 3)]),
    (wire.WorkerLost(1, 3, "why"), [events.WorkerLost(DEVICE, 3, "why")]),
    (
        wire.Step(1, 3, [(7, 1, 0.5)], [(8, 2, "stop", 9)], [(6, 4, "why", 8, True, False)]),
        [
            events.FirstToken(7, 1, 0.5),
            events.SequenceDone(8, 2, FinishReason.STOP, 9),
            events.SequenceRefused(6, 4, "why", 8, True),
        ],
    ),
    (wire.Progress(1, 3, [(7, 1, 2, 3)], 10, 20, {}), [events.Progress(DEVICE, 3, ((7, 1, 2, 3),))]),
    (
        wire.Heartbeat(
            [wire.WorkerState(1, 3, 99, 5, "id", [4]), wire.WorkerState(2, 0, 0, 0, "", [])],
            [("c", 8)], {"upload": 2.0, "disk": 1.0}, 8, {"disk": 8}, lent={"d": 2, "b": 1},
        ),
        [
            events.Heartbeat(
                "n", ((DEVICE, 3, (4,)),), (("c", 8),), (("disk", 1.0), ("upload", 2.0)), (("b", 1), ("d", 2))
            )
        ],
    ),
    (wire.Beat(1, True, 0.1), []),
]  # fmt: skip

TO_NODE: list[tuple[commands.Command, tuple[str, int, wire.Message]]] = [
    (commands.Reserve(DEVICE, 5, 9), ("n", 1, wire.Reserve(1, 5, 9))),
    (
        commands.StartLoad(5, DEVICE, "m", "/m", "c", "float32", 8),
        ("n", -1, wire.StartLoad(5, 1, "m", "/m", "c", "float32", 8)),
    ),
    (
        commands.StartLoad(5, DEVICE, "m", "/m", "c", "float32", 8, verify="full"),
        ("n", -1, wire.StartLoad(5, 1, "m", "/m", "c", "float32", 8, verify="full")),
    ),
    (
        commands.StartLoad(5, DEVICE, "m", "/m", "c", "float32", 8, online=False),
        ("n", -1, wire.StartLoad(5, 1, "m", "/m", "c", "float32", 8, online=False)),
    ),
    (commands.Hasten(5, DEVICE), ("n", -1, wire.Hasten(5))),
    (commands.Unload(5, DEVICE), ("n", -1, wire.Unload(5))),
    (commands.Cancel(DEVICE, 7, 2), ("n", 1, wire.Cancel([(7, 2)]))),
    (commands.KillWorker(DEVICE, 3), ("n", -1, wire.KillWorker(1, 3))),
    (commands.Forget("n", "c"), ("n", -1, wire.Forget("c"))),
]


@pytest.mark.parametrize(("message", "expected"), FROM_NODE)
def test_what_nodes_say(message: wire.Message, expected: list[events.Event]) -> None:
    assert translate.from_node("n", message) == expected


def test_an_agents_first_word() -> None:
    hello = wire.Hello(
        protocol=1,
        node="n",
        pid=4,
        dram=100,
        devices=[wire.Device(0, "cpu", 10, "view"), wire.Device(1, "cuda", 20, "copy")],
        workers=[wire.WorkerState(0, 0, 0, 0, "", []), wire.WorkerState(1, 3, 99, 5, "id", [4])],
        replicas=[(4, 1, "m", "c", "auto")],
        resident=[("c", 8)],
        bandwidth={"disk": 1.0},
        shared=[(4, 7, 100), (9, 7, 100), (4, 8, 50)],
    )
    assert translate.joined(hello) == events.NodeJoined(
        NodeSpec("n", 100, (DeviceSpec(0, "cpu", 10, "view"), DeviceSpec(1, "cuda", 20, "copy")), {"disk": 1.0}),
        ((DEVICE, 3),),
        (events.HeldReplica(4, DEVICE, "m", "c", "auto", ((7, 100), (8, 50))),),
        (("c", 8),),
    )


def test_what_gateways_say() -> None:
    arrived = translate.from_gateway(wire.Arrive(7, "m", "c", "offline", 5.0, "id"))
    assert arrived == [events.RequestArrived(7, "m", "c", WorkClass.OFFLINE, 5.0)]
    assert translate.from_gateway(wire.Prompted(7, 3, 4)) == [events.PromptReady(7, 3, 4)]
    assert translate.from_gateway(wire.Gone([7, 8], "left")) == [events.ClientGone(7), events.ClientGone(8)]
    assert translate.from_gateway(wire.Ask(1, "show", "m", b"")) == []


@pytest.mark.parametrize(("command", "expected"), TO_NODE)
def test_what_nodes_are_told(command: commands.Command, expected: tuple[str, int, wire.Message]) -> None:
    assert translate.to_node(command) == expected
    assert translate.to_gateway(command, 0) is None


def test_decisions_as_lines_of_the_log() -> None:
    decided = commands.Decided(5, "org/m", DEVICE, 0.25, (3, 4))
    assert translate.described(decided) == "decided device=n/1 replica=5 model=org/m predicted_s=0.2500 victims=3,4"
    evicted = commands.Evicted(5, "org/m", DEVICE, "keep-alive")
    assert translate.described(evicted) == "evicted device=n/1 replica=5 model=org/m reason=keep-alive"
    back = commands.GivenBack(7, "m", DEVICE, "no room")
    assert translate.described(back) == "givenback device=n/1 sequence=7 model=m why=no-room"
    line = translate.described(commands.Outcome(5, "m", DEVICE, 0.25, 0.3, PHASES))
    assert line.startswith("outcome device=n/1 replica=5 model=m predicted_s=0.2500 actual_s=0.3000 queue_s=0.1000")
    assert line.endswith("dram_bytes=30 remote_s=0.4000 remote_bytes=40")


def test_what_gateways_are_told() -> None:
    warm = commands.Dispatch(7, 2, 5, DEVICE, 0.25, None)
    assert translate.to_gateway(warm, 42) == wire.Attach(7, 2, 5, 42, "n/1", 250.0, {})
    assert translate.to_gateway(commands.GivenBack(7, "m", DEVICE, "no room"), 42) == wire.GivenBack(7)
    cold = translate.to_gateway(commands.Dispatch(7, 2, 5, DEVICE, 0.25, PHASES), 42)
    assert isinstance(cold, wire.Attach)
    assert cold.cold == {
        "load_queue_ms": 100.0, "load_remote_ms": 400.0, "load_disk_ms": 200.0, "load_upload_ms": 300.0,
        "load_ms": 600.0,
    }  # fmt: skip
    refused = commands.Reject(7, 503, "overloaded", "why", 2.0, True)
    assert translate.to_gateway(refused, 0) == wire.Rejected(7, 503, "overloaded", "why", 2.0, True)
    assert translate.to_node(refused) is None
