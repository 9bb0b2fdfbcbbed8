"""What several tests of a node need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm import wire
from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.unit.node.agent_end import Agent


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("node") / "tiny"
    make_checkpoint("tiny-llama", directory, dtype="float32")
    return directory


@pytest.fixture(params=["view", "copy"])
def agent(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Agent]:
    one = Agent(checkpoint, request.param)
    yield one
    one.close()


@pytest.fixture
def ready(agent: Agent) -> Agent:
    agent.place()
    agent.land()
    agent.answer(wire.Placed)
    return agent
