"""What the status shows."""

from __future__ import annotations

import math

import pytest

from serverless_llm.cluster import events as e
from serverless_llm.cluster import views
from serverless_llm.domain import FinishReason, Tier
from tests.unit.cluster.desk import D0, QUIET, Desk, deploy, node

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a", keep_alive=10.0))
    return desk


def see(desk: Desk) -> views.ModelView:
    return views.model(desk.machine.state, desk.machine.policy, desk.machine.state.models["a"], desk.now)


def test_a_model_from_unloaded_to_loaded_to_idle(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (("disk", 10.0),)))
    assert see(desk) == views.ModelView("unloaded", Tier.DISK, 0, 0.0, "", (), None, None, 0, 0)
    desk.ask(1, "a")
    assert see(desk).estimate_s == 8.0 + 0.05
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
    desk.ask(2, "a")
    assert see(desk).until is None


def test_who_waits_is_told_of_no_load_that_nobody_waits_for() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    desk.machine.state.nodes["n0"].bandwidth["disk"] = 10.0
    desk.tell(deploy("b", min_replicas=1))
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    assert see(desk).estimate_s == 8.0 + 0.05


def test_bytes_in_dram_show(desk: Desk) -> None:
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (("sha-a", 80),), ()))
    desk.ask(1, "a")
    assert (see(desk).tier, round(see(desk).estimate_s or 0.0, 6)) == (Tier.DRAM, 0.05)


def test_where_no_node_is_bytes_are_on_disk() -> None:
    desk = Desk()
    desk.tell(deploy("a"))
    assert see(desk).tier is Tier.DISK


def test_where_a_server_alone_has_bytes_the_model_is_there() -> None:
    desk = Desk(QUIET)
    desk.tell(deploy("a", remote_bytes=70))
    assert (see(desk).tier, see(desk).remote_bytes) == (Tier.REMOTE, 70)
    desk.join()
    desk.join(node("n1"))
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (), away=(("sha-a", 20),)))
    assert (see(desk).tier, see(desk).remote_bytes) == (Tier.REMOTE, 20)
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (("sha-a", 80),), (), away=(("sha-a", 20),)))
    assert see(desk).tier is Tier.DRAM
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (), away=(("sha-a", 0),)))
    assert (see(desk).tier, see(desk).remote_bytes) == (Tier.DISK, 0)


def test_a_failed_model_says_why(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    desk.tell(e.LoadFailed(1, "bad header", False))
    one = see(desk)
    assert (one.state, one.error) == ("failed", "bad header")


def test_without_a_device_no_start_can_be_foreseen(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.ask(1, "a")
    assert see(desk).estimate_s == math.inf


def test_what_is_pinned_stays_without_end(desk: Desk) -> None:
    desk.ask(1, "a")
    desk.bring_up(1)
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert see(desk).until == 10.0
    desk.tell(e.Pin("a", True))
    assert see(desk).until is None


def half_idle() -> Desk:
    """Two devices serve `a`; the second has had nothing to do since sequence 2 ended."""
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    desk.serve("a", 1, keep_alive=10.0, max_replicas=2, max_concurrency=1)
    desk.ask(2, "a")
    desk.bring_up(2)
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    return desk


def test_an_idle_replica_that_takes_over_stays() -> None:
    desk = half_idle()
    assert ("idle", 2) in desk.machine.state.timers
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert 1 in desk.machine.state.replicas[2].running
    assert see(desk).until is None


def test_a_model_goes_when_its_last_replica_does() -> None:
    desk = half_idle()
    assert see(desk).until is None
    desk.tell(e.SequenceDone(1, 1, DONE, 3), after=5.0)
    assert see(desk).until == 15.0
