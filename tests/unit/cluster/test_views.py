"""What the status shows."""

from __future__ import annotations

import math

import pytest

from serverless_llm.cluster import events as e
from serverless_llm.cluster import views
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import FinishReason, Tier
from tests.unit.cluster.desk import D0, Desk, deploy

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    desk = Desk(Policy(silent_after=1e9))
    desk.join()
    desk.tell(deploy("a", keep_alive=10.0))
    return desk


def see(desk: Desk) -> views.ModelView:
    return views.models(desk.machine.state, desk.machine.policy, desk.now)[0]


def test_a_model_from_unloaded_to_loaded_to_idle(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (("disk", 10.0),)))
    assert see(desk) == views.ModelView("a", "unloaded", Tier.DISK, 0.0, "", (), None, 8.0 + 0.05, 0, 0, None)
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadProgress(1, 20, 80))
    one = see(desk)
    assert (one.state, one.progress, one.devices, one.waiting, one.running) == ("loading", 0.25, (D0,), 1, 0)
    desk.bring_up(1)
    one = see(desk)
    assert (one.state, one.tier, one.progress, one.waiting, one.running) == ("loaded", Tier.DEVICE, 1.0, 0, 1)
    assert one.until is None
    desk.tell(e.SequenceDone(1, 1, DONE, 3), after=5.0)
    assert see(desk).until == 15.0


def test_bytes_in_dram_show(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (("sha-a", 80),), ()))
    assert (see(desk).tier, round(see(desk).estimate_s, 6)) == (Tier.DRAM, 0.05)


def test_a_failed_model_says_why_and_when_to_try_again(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "bad header", False))
    one = see(desk)
    assert (one.state, one.error, one.retry_after) == ("failed", "bad header", 1.0)


def test_without_a_device_no_start_can_be_foreseen(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert see(desk).estimate_s == math.inf


def test_devices_and_nodes(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.bring_up(1)
    (device,) = views.devices(desk.machine.state)
    assert device == views.DeviceView(
        D0, "cpu", "copy", True, 100, 90, (views.ReplicaView(1, "a", "ready", 90, 1),), ""
    )
    desk.tell(e.Heartbeat("n0", ((D0, 1, (1,)),), (("sha-a", 80),), (("disk", 7.0),)), after=1.0)
    (node,) = views.nodes(desk.machine.state, desk.now + 0.5)
    assert node == views.NodeView("n0", "up", 1000, 0, 80, 0.5, (("disk", 7.0),))


def test_a_trial_shows(desk: Desk) -> None:
    desk.ask(1, "a")
    for incarnation in (1, 2):
        desk.tell(e.Reserved(D0, incarnation))
        desk.tell(e.WorkerLost(D0, incarnation, "killed"))
        desk.tell(e.WorkerUp(D0, incarnation + 1))
    (device,) = views.devices(desk.machine.state)
    assert device.trial == "load 3"
