"""What replicas share on a worker's device."""

from __future__ import annotations

import pytest

from serverless_llm import wire
from serverless_llm.loader import header
from tests.unit.node.agent_end import Agent

pytestmark = pytest.mark.parametrize("agent", ["copy"], indirect=True)


def twins(agent: Agent) -> list[tuple[int, int, int, int]]:
    """All tensors of replica 1."""
    count = len(header.parse(agent.raw, len(agent.raw)).tensors)
    return [(1, 0, 0, count - 4), (1, count - 4, count - 4, 3)]


@pytest.mark.parametrize("last_first", [False, True])
def test_a_replica_that_has_all_in_common_serves_when_the_last_has_landed(ready: Agent, last_first: bool) -> None:
    count = sum(number for *_, number in twins(ready))
    ready.place(2, twins=[*twins(ready), (1, count, count, 1)])
    start, half = ready.pool.offset(1), len(ready.raw) // 2
    parts = [(0, 0, half, start), (0, half, len(ready.raw) - half, start + half)]
    ready.send(wire.Landed(2, parts[:1], False))
    ready.send(wire.Reserve(0, 9, 0))
    ready.answer(wire.Reserved)
    assert [one.replica for one in ready.all(wire.Placed)] == [1]
    ready.send(wire.Landed(2, parts[1:], True))
    placed = ready.answer(wire.Placed)
    assert placed.replica == 2
    assert {lender for *_, lender in placed.shared} == {1}
    if last_first:
        ready.send(wire.Drop(1))
        ready.answer(wire.Dropped)
    ready.run(4, replica=2)
    ready.until(lambda: ready.finished(4))


def test_a_replica_shares_with_who_is_still_there(ready: Agent) -> None:
    ready.run(3)
    ready.until(lambda: ready.finished(3))
    ready.place(2, twins=twins(ready))
    ready.land(2)
    assert ready.answer(wire.Placed).shared
    ready.send(wire.Drop(1))
    ready.answer(wire.Dropped)
    ready.run(4, replica=2)
    ready.until(lambda: ready.finished(4))
    assert ready.said(4) == ready.said(3)
    ready.place(5, twins=twins(ready))  # with one that has gone
    ready.land(5)
    assert ready.answer(wire.Placed).shared == []


def test_a_replica_whose_bytes_have_not_come_shares_nothing(agent: Agent) -> None:
    agent.place(1)
    agent.place(2, twins=twins(agent))
    agent.land(2)
    assert agent.answer(wire.Placed).shared == []


def test_what_is_converted_is_shared(agent: Agent) -> None:
    agent.place(1, dtype="bfloat16")
    agent.land(1)
    agent.answer(wire.Placed)
    agent.run(3)
    agent.until(lambda: agent.finished(3))
    agent.place(2, dtype="bfloat16", twins=twins(agent))
    agent.land(2)
    assert agent.answer(wire.Placed).shared
    count = sum(number for *_, number in twins(agent))
    agent.place(5, dtype="bfloat16", twins=[(2, 0, 0, count + 1)])  # all of it
    agent.land(5)
    assert {lender for *_, lender in agent.answer(wire.Placed).shared} == {2}
    for replica in (1, 2):
        agent.send(wire.Drop(replica))
        agent.answer(wire.Dropped)
    agent.run(6, replica=5)
    agent.until(lambda: agent.finished(6))
    assert agent.said(6) == agent.said(3)
