"""The head's own wiring."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serverless_llm import framing, wire
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.node.head import Head
from serverless_llm.node.state import State


def test_every_head_numbers_its_replicas_anew(tmp_path: Path) -> None:
    async def first() -> int:
        kept = State(tmp_path)
        machine = Machine(Policy())
        Head(kept, machine, [], lambda message: None)
        kept.close()
        return machine.state.next_replica

    assert [asyncio.run(first()) for _ in range(2)] == [(1 << 32) + 1, (2 << 32) + 1]


@pytest.mark.parametrize("replica", [(1 << 32) + 1, (1 << 63) - 1])
def test_replica_ids_travel_whole(replica: int) -> None:
    message = wire.Unload(replica)
    frame = wire.encode(message, framing.CONTROLLER, framing.agent_address(0), 1)
    assert wire.decode(wire.KIND[wire.Unload], frame[framing.HEADER.size :]) == message
