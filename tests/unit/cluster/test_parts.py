"""Deadlines, ledgers and tables."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from serverless_llm.cluster.ledger import Ledger
from serverless_llm.cluster.timers import Timers
from serverless_llm.cluster.transitions import NODE, REPLICA, SEQUENCE, NodeState, ReplicaState, SequenceState, move
from serverless_llm.errors import InvariantError


def test_deadlines_fire_in_order_of_time_then_of_arming() -> None:
    timers = Timers()
    for name, at in (("late", 3.0), ("b", 1.0), ("a", 1.0), ("never", 9.0)):
        timers.arm((name, 0), at)
    assert list(timers.due(3.0)) == [("b", 0), ("a", 0), ("late", 0)]
    assert timers.earliest() == 9.0
    assert len(timers) == 1


def test_a_deadline_armed_again_replaces_the_earlier_one() -> None:
    timers = Timers()
    timers.arm(("x", 1), 1.0)
    timers.arm(("x", 1), 5.0)
    assert list(timers.due(4.0)) == []
    assert timers.at(("x", 1)) == 5.0
    timers.disarm(("x", 1))
    assert timers.earliest() is None
    assert timers.at(("x", 1)) is None
    assert ("x", 1) not in timers


def test_replaced_deadlines_do_not_pile_up() -> None:
    timers = Timers()
    for number in range(10_000):
        timers.arm(("x", 1), float(number))
    assert len(timers._heap) < 100
    assert list(timers.due(1e9)) == [("x", 1)]


def test_deadlines_that_were_not_replaced_keep_their_order_when_others_are_swept() -> None:
    timers = Timers()
    for name, at in (("late", 9.0), ("later", 12.0), ("soon", 1.0)):
        timers.arm((name, 0), at)
    for _ in range(100):
        timers.arm(("replaced", 0), 10.0)
    assert len(timers._heap) < 100  # swept
    assert timers.earliest() == 1.0
    assert list(timers.due(20.0)) == [("soon", 0), ("late", 0), ("replaced", 0), ("later", 0)]


def test_a_deadline_armed_while_others_fire_waits_for_its_time() -> None:
    timers = Timers()
    timers.arm(("x", 1), 1.0)
    for _ in timers.due(2.0):
        timers.arm(("x", 1), 3.0)
    assert timers.earliest() == 3.0


def test_a_ledger_knows_what_is_free_when_some_leave() -> None:
    ledger = Ledger(100)
    for key, size in (("a", 10), ("ab", 5), ("b", 20), ("ab", 5), ("abc", 2), ("abc", 2), ("abc", 2)):
        ledger.add(key, size)
    a, b = [("a", 10), ("ab", 5), ("abc", 2)], [("b", 20), ("ab", 5), ("abc", 2)]
    assert (ledger.freed(a), ledger.freed(b), ledger.freed([*a, *b]), ledger.freed([])) == (10, 20, 35, 0)
    assert ledger.missing(("new", 80), ("ab", 5), ("other", 1)) == 18


def test_a_ledger_counts_a_shared_key_once() -> None:
    ledger = Ledger(100)
    ledger.add("sha", 60)
    ledger.add("sha", 60)
    assert (ledger.used, ledger.free) == (60, 40)
    assert (ledger.missing(("sha", 60)), ledger.missing(("other", 60))) == (-40, 20)
    ledger.remove("sha")
    assert ledger.used == 60
    ledger.remove("sha")
    assert (ledger.used, ledger.held) == (0, {})


@dataclass
class Thing:
    state: ReplicaState
    history: deque[tuple[float, str]] = field(default_factory=lambda: deque([(0.5, "room")]))


def test_an_illegal_step_raises_with_the_life_so_far() -> None:
    thing = Thing(ReplicaState.RESERVING)
    move(REPLICA, thing, "reserved", 1.0)
    assert thing.state is ReplicaState.LOADING
    with pytest.raises(InvariantError, match=r"loading knows no 'room' at 2.0.*\(1.0, 'reserved'\)"):
        move(REPLICA, thing, "room", 2.0)


@pytest.mark.parametrize("table", [REPLICA, SEQUENCE, NODE])
def test_every_state_but_the_last_has_a_way_out_and_a_way_in(table: dict[tuple[str, str], str]) -> None:
    ends = {"gone", "done"}
    starts = {"claiming", "tokenising", "up"}
    states = set(type(next(iter(table))[0]))  # type: ignore[call-overload]
    assert {state for state, _ in table} == states - ends
    assert {*table.values()} | starts >= states


def test_states_have_the_names_that_the_status_shows() -> None:
    assert " ".join(ReplicaState) == "claiming reserving loading ready unloading gone"
    assert " ".join(SequenceState) == "tokenising waiting resting suspect dispatched running done"
    assert " ".join(NodeState) == "up dropped gone"


def test_every_sequence_can_end() -> None:
    assert all((state, "done") in SEQUENCE for state in SequenceState if state is not SequenceState.DONE)


def test_deadlines_keep_their_order_when_replaced_ones_are_swept() -> None:
    timers = Timers()
    for at in range(200):
        for key in range(10):
            timers.arm(("x", key), float(at + 100 - 10 * key))
    assert list(timers.due(1000.0)) == [("x", key) for key in reversed(range(10))]
