"""The state directory: who may use it, and what it remembers."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.config import load
from serverless_llm.domain import ModelSpec
from serverless_llm.errors import ConfigurationError
from serverless_llm.node import state
from serverless_llm.node.head import Head
from serverless_llm.node.options import local_agents
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
    newer = (tmp_path / "state.db").read_bytes()
    with pytest.raises(ConfigurationError, match="schema 7"):
        State(tmp_path)
    assert (tmp_path / "state.db").read_bytes() == newer
    assert holder(tmp_path / "lock") is None


def test_an_older_schema_is_copied_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = State(tmp_path)
    old.save(deployed("a"))
    old.close()
    monkeypatch.setattr(state, "MIGRATIONS", ("ALTER TABLE models ADD COLUMN note TEXT", "CREATE TABLE notes (a)"))
    new = State(tmp_path)
    assert new.generation == old.generation + 1
    assert new._meta("schema") == 3
    assert new._database.execute("SELECT name, note FROM models").fetchall() == [("a", None)]
    new.close()
    copy = sqlite3.connect(tmp_path / "state.db.schema1")
    assert copy.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone() == (1,)
    assert copy.execute("SELECT name FROM models").fetchall() == [("a",)]
    copy.close()
    State(tmp_path).close()  # it is migrated once


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = State(tmp_path)
    old.save(deployed("a"))
    old.close()
    with monkeypatch.context() as patch:
        patch.setattr(state, "MIGRATIONS", ("CREATE TABLE notes (a)", "DROP TABLE nowhere"))
        with pytest.raises(ConfigurationError, match="no such table: nowhere"):
            State(tmp_path)
    back = State(tmp_path)
    assert back.models() == [deployed("a")]
    assert back._database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'notes'").fetchone() == (0,)
    back.close()


def test_a_new_database_has_the_newest_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MIGRATIONS", ("DROP TABLE nowhere",))  # it is made so, not led there
    new = State(tmp_path)
    assert new._meta("schema") == 2
    new.close()
    assert not (tmp_path / "state.db.schema1").exists()


def test_a_locked_database_is_named(tmp_path: Path) -> None:
    State(tmp_path).close()
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigurationError, match=r"state\.db is locked by another program"):
        State(tmp_path, patience=0.0)
    assert state.LOCK_SECONDS == 5  # a backup may take so long
    other.close()
    State(tmp_path, patience=0.0).close()


@pytest.mark.parametrize("damage", ["rubbish", "page", "row"])
def test_a_corrupt_database_is_named(tmp_path: Path, damage: str) -> None:
    first = State(tmp_path)
    for number in range(100):
        first.save(deployed(f"m{number}"))
    if damage == "row":
        first._database.execute("UPDATE models SET spec = x'c1' WHERE name = 'm7'")
    first.close()
    path = tmp_path / "state.db"
    if damage == "rubbish":
        path.write_bytes(b"rubbish" * 1000)
    if damage == "page":
        raw = bytearray(path.read_bytes())
        raw[4096:] = os.urandom(len(raw) - 4096)
        path.write_bytes(raw)
    with pytest.raises(ConfigurationError, match=r"state\.db") as raised:
        State(tmp_path).models()
    assert ("'m7' cannot be read" if damage == "row" else "is damaged") in str(raised.value)


def test_a_database_that_is_read_only_is_named(tmp_path: Path) -> None:
    State(tmp_path).close()
    with unprivileged(tmp_path):
        (tmp_path / "state.db").chmod(0o400)
        with pytest.raises(ConfigurationError, match=r"state\.db cannot be opened for writing"):
            State(tmp_path)


def test_a_state_directory_that_is_read_only_is_named(tmp_path: Path) -> None:
    with unprivileged(tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigurationError, match="Permission denied"):
            State(tmp_path / "state")
        with pytest.raises(ConfigurationError, match="api-key"):
            state.secret(tmp_path / "api-key")
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("foreign", ["agents", "logs", "agents/node0.lock", "logs/agent-node0.log"])
def test_what_an_agent_cannot_write_is_named_before_anybody_is_served(tmp_path: Path, foreign: str) -> None:
    (agent,) = local_agents(load({"state_dir": tmp_path, "devices": "cpu:1"}, {"HOME": "/nowhere"}, memory=1 << 30))
    kept = State(tmp_path)
    agent.lock_path.touch()
    (tmp_path / "logs" / "agent-node0.log").touch()
    with unprivileged(tmp_path):
        (tmp_path / foreign).chmod(0o000)
        with pytest.raises(ConfigurationError, match=rf"/{foreign}.*: Permission denied$"):
            Head(kept, Machine(Policy()), [agent], lambda message: None)
        (tmp_path / foreign).chmod(0o700)
    kept.close()


def test_an_empty_secret_is_named(tmp_path: Path) -> None:
    """With it anybody would pass."""
    (tmp_path / "agent-token").write_text("\n")
    with pytest.raises(ConfigurationError, match=r"agent-token is empty; remove it, and a new secret is made"):
        agent_token(tmp_path)


def test_a_secret_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves a name with nothing behind it."""
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        assert not (tmp_path / "agent-token").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    assert synced == [len(agent_token(tmp_path))]


@contextlib.contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    """Permissions hold for root as well, and `directory` with all in it is this user's."""
    nobody = 65534
    if os.geteuid():
        yield
        return
    for path in (directory, *directory.rglob("*")):
        os.chown(path, nobody, nobody)
    for parent in directory.parents:
        parent.chmod(parent.stat().st_mode | 0o011) if parent.owner() == "root" else None
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    one = State(tmp_path)
    (pages,) = one._database.execute("PRAGMA page_count").fetchone()
    one._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full") as raised:
        one.save(deployed("a", "/x" * 5000))
    assert "is the disk full?" in state._why(one.path, raised.value)
    assert one.models() == []
    one.close()


@contextlib.contextmanager
def small_files(most: int) -> Iterator[None]:
    """This process writes no file of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("new", [True, False], ids=["first", "again"])
def test_a_disk_that_takes_no_more_at_the_start_is_named(tmp_path: Path, new: bool) -> None:
    if not new:
        State(tmp_path).close()
    with (
        small_files(100),
        pytest.raises(ConfigurationError, match=r"state\.db cannot be written: .*; is the disk full\?"),
    ):
        State(tmp_path)
    assert holder(tmp_path / "lock") is None
    State(tmp_path).close()


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


def test_a_disk_that_does_not_take_the_heads_address_is_named(tmp_path: Path) -> None:
    with small_files(20), pytest.raises(ConfigurationError, match=r"head\.json: File too large"):
        write_head(tmp_path, HeadAddress("http://127.0.0.1:1", 1, 10))
