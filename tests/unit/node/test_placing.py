"""The worker's half of a load, at the other end of its socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm import wire
from serverless_llm.engine.sequence import StepResult
from serverless_llm.loader.link import Priority
from tests.serving import until
from tests.unit.node.agent_end import Agent


def test_a_replica_is_placed_from_pieces_in_any_order(agent: Agent, request: pytest.FixtureRequest) -> None:
    agent.place()
    agent.land()
    placed = agent.answer(wire.Placed)
    assert placed.replica == 1
    assert placed.leased == ("view" in request.node.name)
    agent.until(lambda: not agent.all(wire.Beat)[-1].runnable if agent.all(wire.Beat) else False)


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_copies_are_compared_before_a_replica_serves(agent: Agent, verify: str, request: pytest.FixtureRequest) -> None:
    agent.place(verify=verify)
    agent.land()
    agent.answer(wire.Placed)
    compared = agent.all(wire.Compared)
    if "view" in request.node.name:
        assert compared == []
        return
    (one,) = compared
    assert 0 < one.bytes < len(agent.raw)  # the header is not copied
    assert (one.replica, one.mended, one.differing) == (1, 0, [])
    assert [type(message) for _, message in agent.heard].index(wire.Compared) < [
        type(message) for _, message in agent.heard
    ].index(wire.Placed)


@pytest.mark.parametrize("ring", [False, True])
def test_a_bit_flipped_on_the_device_is_copied_again_if_it_can_be(checkpoint: Path, ring: bool) -> None:
    agent = Agent(checkpoint, "copy")
    arena = agent._worker._engine.arena
    agent.place(ring=ring, verify="full")
    half, start = len(agent.raw) // 2, agent.pool.offset(1)
    agent.send(wire.Landed(1, [(0, 0, half, start)], False))
    until(lambda: bool(arena.any()), "the first copies")
    until(lambda: agent._worker._placing._placements[1].task.done > 0, "their end")
    place = int(arena.nonzero()[0])
    arena[place] ^= 1
    agent.send(wire.Landed(1, [(0, half, len(agent.raw) - half, start + half)], True))
    compared = agent.answer(wire.Compared)
    agent.send(wire.Drop(1))
    agent.answer(wire.Dropped)
    agent.close()
    if ring:
        assert [file for file, _, _ in compared.differing] == [0]
        assert agent.all(wire.Placed) == []
    else:
        assert (compared.mended, compared.differing) == (1, [])
        assert len(agent.all(wire.Placed)) == 1


def test_a_load_can_be_dropped_half_way_and_begun_anew(agent: Agent) -> None:
    agent.place()
    agent.send(wire.Landed(1, [(0, 0, len(agent.raw) // 2, agent.pool.offset(1))], False))
    agent.send(wire.Drop(1))
    agent.answer(wire.Dropped)
    agent.land()  # late news of the dropped load
    agent.place()
    agent.land()
    agent.answer(wire.Placed)
    assert len(agent.all(wire.Placed)) == 1


@pytest.mark.parametrize("room", [True, False])
def test_what_is_converted_passes_through_no_ring(checkpoint: Path, room: bool) -> None:
    """That is for good where DRAM could never hold all of it."""
    agent = Agent(checkpoint, "copy")
    agent.place(dtype="bfloat16", ring=True, room=room)
    agent.land()
    failed = agent.answer(wire.Failed)
    assert "is stored in another type than bfloat16" in failed.message
    assert failed.permanent is not room
    agent.close()


@pytest.mark.parametrize("agent", ["view"], indirect=True)
def test_a_worker_heeds_what_is_urgent_and_what_memory_went(agent: Agent) -> None:
    agent.place(online=False)
    agent.send(wire.Hasten(7))  # it failed before
    agent.send(wire.Punched(0))
    agent.send(wire.Reserve(0, 9, 0))
    agent.answer(wire.Reserved)
    (placement,) = agent._worker._placing._placements.values()
    before = placement.task.priority
    agent.send(wire.Hasten(1))
    agent.send(wire.Reserve(0, 9, 0))
    agent.answer(wire.Reserved)
    assert (before, placement.task.priority) == (Priority.PREFETCH, Priority.ONLINE)


def test_loads_yield_while_there_is_something_to_compute(ready: Agent) -> None:
    due = []
    step = ready._worker._engine.step

    def noted() -> StepResult:
        due.append(ready._worker._placing._uploader.step_due)
        return step()

    ready._worker._engine.step = noted  # type: ignore[method-assign]
    ready.run(1)
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    ready.send(wire.Reserve(0, 9, 0))
    ready.answer(wire.Reserved)
    until(lambda: not ready._worker._placing._uploader.step_due, "rest")
    assert set(due) == {True}


def test_what_is_pinned_is_told(agent: Agent) -> None:
    agent._worker._placing._uploader._on_pinned(5, "no more")
    assert agent.answer(wire.Pinned) == wire.Pinned(5, "no more")


def test_what_cannot_be_placed_fails_for_good(agent: Agent) -> None:
    agent.place(2, config='{"architectures": ["Unknown"]}')
    failed = agent.answer(wire.Failed)
    assert failed.permanent
    assert "architectures" in failed.message
    agent.place(3, config=agent.config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    agent.land(3)
    failed = agent.answer(wire.Failed)
    assert failed.permanent
    assert "missing from the checkpoint" in failed.message
    agent.place(1)
    agent.land(1)
    assert agent.answer(wire.Placed).replica == 1


def maps() -> int:
    """How often this process maps a pool."""
    return Path("/proc/self/maps").read_text().count("memfd:weights")


def test_a_checkpoint_in_another_dtype_is_converted(agent: Agent) -> None:
    before = maps()
    for replica in (1, 2, 3):
        agent.place(replica, dtype="bfloat16")
        agent.land(replica)
        assert not agent.answer(wire.Placed).leased
    assert maps() <= before + 1  # the one that is kept for the next replica
    agent.run(1, tokens=4)
    agent.until(lambda: agent.finished(1))
    assert len(agent.said(1)) == 4
    agent.send(wire.Drop(1))
    assert agent.answer(wire.Dropped) == wire.Dropped(1)
    agent.place(4, dtype="bfloat16")
    agent.land(4)
    assert agent.answer(wire.Placed).replica == 4


def test_a_conversion_can_be_dropped_half_way_and_begun_anew(agent: Agent) -> None:
    agent.place(dtype="bfloat16")
    agent.land()
    agent.send(wire.Hasten(1))
    agent.send(wire.Drop(1))
    agent.answer(wire.Dropped)
    agent.place(2, dtype="bfloat16")
    agent.land(2)
    agent.until(lambda: any(one.replica == 2 for one in agent.all(wire.Placed)))
