"""The head's state on disk: one directory with one owner, and the database of deployed models in it.

Layout: `lock` (flock by the head), `state.db` (SQLite, WAL), `head.json` (where the head listens, for agents),
`agent-token`, `api-key` (where one was made), `agents/`, `logs/`. A deploy is synced before it is answered.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path

import msgspec

from serverless_llm.domain import ModelSpec
from serverless_llm.errors import ConfigurationError

SCHEMA = 1
_SCRIPT = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (name TEXT PRIMARY KEY, spec BLOB NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
"""


class HeadAddress(msgspec.Struct, frozen=True):
    """`head.json`: where agents dial in."""

    url: str
    generation: int
    pid: int


class Deployed(msgspec.Struct, frozen=True):
    """A row of `models`. `created`: unix time in seconds."""

    spec: ModelSpec
    created: int


def lock(path: Path, who: str) -> int:
    """Locks `path` for the life of this process and writes its pid there; returns the descriptor.

    Raises:
        ConfigurationError: another process holds it; the message says `who` and names its pid.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigurationError(f"{who} (pid {pid}) already uses {path.parent}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def holder(path: Path) -> int | None:
    """The pid that holds the lock at `path`, None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 32, 0) or b"0")
    else:
        return None
    finally:
        os.close(descriptor)


def agent_token(directory: Path) -> str:
    """The secret with which agents join."""
    return secret(directory / "agent-token")


def secret(path: Path) -> str:
    """The secret that a state directory keeps at `path`, made at first use (mode 0600)."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        file.write(made := secrets.token_urlsafe(32))
    return made


def write_head(directory: Path, address: HeadAddress) -> None:
    """Publishes where this head listens; replaced as a whole, so that agents never read a half."""
    path = directory / "head.json"
    scratch = path.with_suffix(".tmp")
    scratch.touch(0o600)
    scratch.write_bytes(msgspec.json.encode(address))
    scratch.rename(path)


def read_head(directory: Path) -> HeadAddress | None:
    """Where the latest head of this directory listens (or listened)."""
    try:
        return msgspec.json.decode((directory / "head.json").read_bytes(), type=HeadAddress)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


class State:
    """The state directory of one head, locked. `generation` is one more than the last head's.

    Raises:
        ConfigurationError: another head runs on it, or its schema is a newer version's.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in ("agents", "logs"):
            (directory / part).mkdir(exist_ok=True, mode=0o700)
        self.directory = directory
        self._lock = lock(directory / "lock", "another server")
        self._database = sqlite3.connect(directory / "state.db", isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except ConfigurationError:
            self.close()
            raise
        self.generation = self._next_generation()

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)

    def models(self) -> list[Deployed]:
        """All deployed models, in order of names."""
        rows = self._database.execute("SELECT spec, created FROM models ORDER BY name")
        return [Deployed(msgspec.msgpack.decode(spec, type=ModelSpec), created) for spec, created in rows]

    def save(self, model: Deployed) -> None:
        """Adds or replaces a model; durable on return."""
        row = (model.spec.name, msgspec.msgpack.encode(model.spec), model.created)
        self._database.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", row)

    def delete(self, name: str) -> bool:
        """Removes a model; durable on return. False: there was none."""
        return self._database.execute("DELETE FROM models WHERE name = ?", (name,)).rowcount > 0

    def _open(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCRIPT)
        self._database.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (SCHEMA,))
        schema = self._meta("schema")
        if schema > SCHEMA:
            raise ConfigurationError(
                f"{self.directory}/state.db has schema {schema}, this version knows up to {SCHEMA}: use a newer version"
            )

    def _next_generation(self) -> int:
        self._database.execute(
            "INSERT INTO meta VALUES ('generation', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
        )
        return self._meta("generation")

    def _meta(self, name: str) -> int:
        (value,) = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(value)
