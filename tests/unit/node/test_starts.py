"""The log of cold starts: what an operator sees of them, live and afterwards."""

from __future__ import annotations

from collections import deque

import pytest

from serverless_llm.cluster.commands import Outcome
from serverless_llm.cluster.state import Replica, Sequence, State
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.domain import DeviceId, Footprint, LoadPhases, WorkClass
from serverless_llm.node.starts import KEPT, StartLog

DEVICE = DeviceId("n0", 1)
PHASES = LoadPhases(queue_s=0.1, disk_s=2.0, upload_s=0.5, total_s=2.7, disk_bytes=900, dram_bytes=100)


def replica(number: int, state: ReplicaState = ReplicaState.READY) -> Replica:
    return Replica(
        id=number, model="m", revision=1, device=DEVICE, checkpoint="c", footprint=Footprint("c", 1000, 1000, 64, 32),
        dtype="float32", source="/m", kv_floor=64, state=state, decided_at=10.0, history=deque(), keep_alive=300.0,
        predicted_s=4.0, progress_done=250, progress_total=1000,
    )  # fmt: skip


def sequence(arrived: float, served_by: Replica | None) -> Sequence:
    return Sequence(1, "m", 1, 1, arrived, WorkClass.ONLINE, None, deque(), replica=served_by)


def outcome(number: int = 7, actual_s: float = 3.0) -> Outcome:
    return Outcome(number, "m", DEVICE, 4.0, actual_s, PHASES)


def test_a_start_by_its_phases() -> None:
    log = StartLog()
    log.ready(outcome(), now=13.0)
    log.first_token(sequence(10.0, replica(7)), 0.25)
    (shown,) = log.shown(State(), now=20.0, unix=1020.0)
    assert shown["phases"] == {"queue_s": 0.5, "remote_s": 0.0, "disk_s": 2.0, "upload_s": 0.5, "prefill_s": 0.25}
    assert shown["seconds"] == pytest.approx(sum(shown["phases"].values()))
    assert (shown["began"], shown["state"], shown["source"]) == (1010.0, "ready", "disk")
    assert (shown["done"], shown["total"], shown["device"], shown["predicted_s"]) == (900, 1000, "n0/1", 4.0)


def test_a_start_from_a_network_by_its_phases() -> None:
    log = StartLog()
    phases = LoadPhases(remote_s=1.5, upload_s=0.5, total_s=2.0, remote_bytes=700, disk_bytes=50, cache_bytes=25)
    log.ready(Outcome(7, "m", DEVICE, 4.0, 3.0, phases), now=13.0)
    (shown,) = log.shown(State(), now=20.0, unix=1020.0)
    assert shown["phases"] == {"queue_s": 1.0, "remote_s": 1.5, "disk_s": 0.0, "upload_s": 0.5, "prefill_s": None}
    assert (shown["source"], shown["done"], shown["total"]) == ("remote", 775, 775)


def test_the_prefill_of_one_who_waited_and_of_nobody_else() -> None:
    log = StartLog()
    log.ready(outcome(), now=13.0)
    log.first_token(sequence(14.0, replica(7)), 0.1)  # came when it was ready
    log.first_token(sequence(10.0, replica(8)), 0.2)  # is another's
    log.first_token(sequence(10.0, None), 0.3)  # lost its worker meanwhile
    assert log.shown(State(), 20.0, 1020.0)[0]["phases"]["prefill_s"] is None
    log.first_token(sequence(12.0, replica(7)), 0.4)
    log.first_token(sequence(12.0, replica(7)), 0.5)  # the second of those who waited
    assert log.shown(State(), 20.0, 1020.0)[0]["phases"]["prefill_s"] == 0.4


def test_what_goes_on_stands_before_what_is_over() -> None:
    log = StartLog()
    for number in range(KEPT + 2):
        log.ready(outcome(number), now=13.0 + number)
    state = State()
    state.replicas = {90: replica(90, ReplicaState.LOADING), 91: replica(91, ReplicaState.READY)}
    shown = log.shown(state, now=50.0, unix=1050.0)
    assert [row["replica"] for row in shown] == [90, *range(KEPT + 1, 1, -1)]
    live = shown[0]
    assert (live["state"], live["began"], live["seconds"], live["phases"]) == ("loading", 1010.0, 40.0, None)
    assert (live["done"], live["total"]) == (250, 1000)


def test_clocks_of_different_grain_make_no_negative_wait() -> None:
    log = StartLog()
    log.ready(outcome(actual_s=2.4), now=13.0)
    assert log.shown(State(), 13.0, 1013.0)[0]["phases"]["queue_s"] == 0.0
