"""The state directory: who may use it, and what it remembers."""

from __future__ import annotations

import math
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from serverless_llm.domain import ModelSpec
from serverless_llm.errors import ConfigurationError
from serverless_llm.node.state import (
    Deployed,
    HeadAddress,
    State,
    agent_token,
    holder,
    lock,
    read_head,
    write_head,
)


def deployed(name: str, source: str = "/models/a") -> Deployed:
    return Deployed(ModelSpec(name, source, keep_alive=math.inf, context=512), created=1_700_000_000)


def test_models_and_generation_survive_a_restart(tmp_path: Path) -> None:
    first = State(tmp_path / "state")
    first.save(deployed("b"))
    first.save(deployed("a"))
    first.save(deployed("b", "/models/other"))
    first.close()
    second = State(tmp_path / "state")
    assert second.generation == first.generation + 1
    assert second.models() == [deployed("a"), deployed("b", "/models/other")]
    assert second.delete("a")
    assert not second.delete("a")
    assert second.models() == [deployed("b", "/models/other")]
    second.close()


def test_one_server_at_a_time(tmp_path: Path) -> None:
    state = State(tmp_path)
    with pytest.raises(ConfigurationError, match=f"another server \\(pid {os.getpid()}\\)"):
        State(tmp_path)
    state.close()
    State(tmp_path).close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    State(tmp_path).close()
    database = sqlite3.connect(tmp_path / "state.db")
    database.execute("UPDATE meta SET value = 7 WHERE name = 'schema'")
    database.commit()
    database.close()
    with pytest.raises(ConfigurationError, match="schema 7"):
        State(tmp_path)
    assert holder(tmp_path / "lock") is None


def test_deploys_are_synced_before_they_are_answered(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert state._database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert state._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    state.close()


def test_holder_names_the_process_that_locked(tmp_path: Path) -> None:
    path = tmp_path / "node0.lock"
    assert holder(path) is None
    descriptor = lock(path, "another agent")
    assert holder(path) == os.getpid()
    os.close(descriptor)
    assert holder(path) is None


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    token = agent_token(tmp_path)
    assert len(token) > 40
    assert agent_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "agent-token").stat().st_mode) == 0o600


def test_the_heads_address_is_replaced_as_a_whole(tmp_path: Path) -> None:
    assert read_head(tmp_path) is None
    write_head(tmp_path, HeadAddress("http://127.0.0.1:1", 1, 10))
    write_head(tmp_path, HeadAddress("http://127.0.0.1:2", 2, 20))
    assert read_head(tmp_path) == HeadAddress("http://127.0.0.1:2", 2, 20)
    assert stat.S_IMODE((tmp_path / "head.json").stat().st_mode) == 0o600
