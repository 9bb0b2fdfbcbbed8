"""The machine as a whole: ticks, and one log for one input."""

from __future__ import annotations

from typing import get_args

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.machine import HANDLERS, Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import FinishReason
from tests.unit.cluster.desk import D0, Desk, deploy, node


def test_every_event_has_a_handler() -> None:
    assert set(HANDLERS) == set(get_args(e.Event))


def test_a_tick_is_asked_for_when_the_earliest_deadline_changes() -> None:
    machine = Machine(Policy())
    assert machine.handle(e.NodeJoined(node(), ((D0, 1),), (), ()), 1.0) == [c.WakeAt(6.0)]
    assert machine.handle(deploy("a"), 1.0) == []
    assert not [one for one in machine.handle(e.RequestArrived(1, "a", "sha-a"), 2.0) if isinstance(one, c.WakeAt)]
    assert machine.handle(e.Heartbeat("n0", ((D0, 1, ()),), (), ()), 5.0) == []
    assert machine.handle(e.Tick(), 6.0) == [c.WakeAt(10.0)]


def test_a_tick_that_comes_a_moment_early_is_asked_for_again() -> None:
    machine = Machine(Policy())
    machine.handle(e.NodeJoined(node(), ((D0, 1),), (), ()), 1.0)
    assert machine.handle(e.Tick(), 5.9995) == [c.WakeAt(6.0)]
    assert machine.handle(e.Tick(), 6.0) == [c.DropNode("n0"), c.WakeAt(11.0)]


def test_a_deadline_that_any_event_finds_passed_acts() -> None:
    machine = Machine(Policy())
    machine.handle(e.NodeJoined(node(), ((D0, 1),), (), ()), 1.0)
    assert machine.handle(e.ClientGone(7), 6.0) == [c.DropNode("n0"), c.WakeAt(11.0)]


def test_of_a_long_life_only_the_last_steps_are_kept() -> None:
    desk = Desk(Policy(history=3, silent_after=1e9))
    desk.join()
    desk.serve("a", 1)
    desk.tell(e.SequenceRefused(1, 1, "no room"))
    desk.tick(0.1)
    assert [cause for _, cause in desk.machine.state.sequences[1].history] == ["refused", "rested", "dispatch"]


def test_an_empty_machine_asks_for_nothing() -> None:
    machine = Machine(Policy())
    assert machine.handle(deploy("a"), 1.0) == []
    assert machine.handle(e.Tick(), 2.0) == []


def test_an_earlier_deadline_is_asked_for_at_once() -> None:
    desk = Desk()
    desk.join()
    desk.serve("a", 1, keep_alive=1.0)
    done = e.SequenceDone(1, 1, FinishReason.STOP, 3)
    assert desk.machine.handle(done, 0.0) == [c.WakeAt(1.0)]
