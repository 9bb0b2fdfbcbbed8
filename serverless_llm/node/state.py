"""The head's state on disk: one directory with one owner, and the database of deployed models in it.

Layout: `lock` (flock by the head), `state.db` (SQLite, WAL), `head.json` (where the head listens, for agents),
`agent-token`, `api-key` (where one was made), `agents/`, `logs/`. A deploy is synced before it is answered.

The database has a schema version. An older one is copied to `state.db.schema<N>` and migrated in one transaction;
a newer one is refused and left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serverless_llm.domain import ModelSpec
from serverless_llm.errors import ConfigurationError, OccupiedError

MIGRATIONS: tuple[str, ...] = ()  # SQL; the first leads from schema 1 to 2
LOCK_SECONDS = 5.0  # that another program (a backup) may hold the database when the head starts
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE models (name TEXT PRIMARY KEY, spec BLOB NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
"""


class HeadAddress(msgspec.Struct, frozen=True):
    """`head.json`: where this machine's command line finds the head.

    `began`: what tells this process from a later one of its pid. `public`: where clients find it, if not at `url`.
    `agents`: where agents dial in.
    """

    url: str
    generation: int
    pid: int
    began: int | None = None
    public: str = ""
    agents: str = ""


class Deployed(msgspec.Struct, frozen=True):
    """A row of `models`. `created`: unix time in seconds."""

    spec: ModelSpec
    created: int


def lock(path: Path, who: str) -> int:
    """Locks `path` for the life of this process and writes its pid there; returns the descriptor.

    Raises:
        OccupiedError: another process holds it; the message says `who` and names its pid.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise OccupiedError(f"{who} (pid {pid}) already uses {path.parent}; stop it, or use another one") from None
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
    """The secret that a state directory keeps at `path`, made at first use (mode 0600).

    Raises:
        ConfigurationError: it cannot be made or read, or there is nothing in it.
    """
    with _usable(path):
        if not path.exists():
            scratch = path.with_suffix(".tmp")  # renamed when it is whole on the disk: no secret is ever empty
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        text = path.read_text().strip()
    if not text:
        raise ConfigurationError(f"{path} is empty; remove it, and a new secret is made")
    return text


def is_model(directory: Path) -> bool:
    """Whether it holds a checkpoint, and nothing of a server, which would mix its files with them."""
    return any(directory.glob("*.safetensors")) and not (directory / "state.db").exists()


def claim(path: Path) -> None:
    """Makes sure that this process, and so those that it starts, can write a file, which is made where there is none.

    Raises:
        ConfigurationError: they cannot.
    """
    with _usable(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def write_head(directory: Path, address: HeadAddress) -> None:
    """Publishes where this head listens; replaced as a whole, so that agents never read a half.

    Raises:
        ConfigurationError: the directory takes no file.
    """
    path = directory / "head.json"
    scratch = path.with_suffix(".tmp")
    with _usable(path):
        scratch.touch(0o600)
        scratch.write_bytes(msgspec.json.encode(address))
        scratch.rename(path)


def read_head(directory: Path) -> HeadAddress | None:
    """Where the latest head of this directory listens (or listened)."""
    try:
        return msgspec.json.decode((directory / "head.json").read_bytes(), type=HeadAddress)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """
    Raises:
        ConfigurationError: what the system said about `path`.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{error.filename or path}: {error.strerror}") from None


class State:
    """The state directory of one head, locked. `generation` is one more than the last head's.

    Args:
        patience: seconds that another program may hold the database.

    Raises:
        ConfigurationError: another head runs on it, its schema is a newer version's, or it cannot be read or written.
    """

    def __init__(self, directory: Path, patience: float = LOCK_SECONDS) -> None:
        with _usable(directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in ("agents", "logs"):
                (directory / part).mkdir(exist_ok=True, mode=0o700)
            self._lock = lock(directory / "lock", "another server")
        self.directory = directory
        self.path = directory / "state.db"
        try:
            self._database = sqlite3.connect(self.path, timeout=patience, isolation_level=None, check_same_thread=False)
            self._open()
            self.generation = self._next_generation()
        except sqlite3.Error as error:
            self.close()
            raise ConfigurationError(_why(self.path, error)) from error
        except ConfigurationError:
            self.close()
            raise

    def close(self) -> None:
        if hasattr(self, "_database"):
            self._database.close()
        os.close(self._lock)

    def models(self) -> list[Deployed]:
        """All deployed models, in order of names.

        Raises:
            ConfigurationError: a row is not what was written.
        """
        rows = self._database.execute("SELECT name, spec, created FROM models ORDER BY name").fetchall()
        return [Deployed(self._spec(name, spec), created) for name, spec, created in rows]

    def _spec(self, name: str, spec: bytes) -> ModelSpec:
        try:
            return msgspec.msgpack.decode(spec, type=ModelSpec)
        except (msgspec.MsgspecError, TypeError) as error:
            raise ConfigurationError(f"{self.path}: the model {name!r} cannot be read: {error}") from error

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
        ((verdict,),) = self._database.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        schema, newest = self._schema(), 1 + len(MIGRATIONS)
        if schema is None:
            made = f"INSERT INTO meta VALUES ('schema', {newest});"
            self._database.executescript(f"BEGIN IMMEDIATE;\n{_TABLES}{made}\nCOMMIT;")
        elif schema > newest:
            raise ConfigurationError(
                f"{self.path} has schema {schema}, this version knows up to {newest}: use a newer version"
            )
        elif schema < newest:
            self._migrate(schema)

    def _schema(self) -> int | None:
        """Its version; None of a database that is new."""
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'meta'"
        return self._meta("schema") if self._database.execute(tables).fetchone() == (1,) else None

    def _migrate(self, schema: int) -> None:
        """Leaves a copy of the database as it was."""
        with contextlib.closing(sqlite3.connect(self.path.with_name(f"{self.path.name}.schema{schema}"))) as copy:
            self._database.backup(copy)
        steps = "".join(f"{step};\n" for step in MIGRATIONS[schema - 1 :])
        done = f"UPDATE meta SET value = {1 + len(MIGRATIONS)} WHERE name = 'schema';\n"
        try:
            self._database.executescript(f"BEGIN IMMEDIATE;\n{steps}{done}COMMIT;")
        except sqlite3.Error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _next_generation(self) -> int:
        self._database.execute(
            "INSERT INTO meta VALUES ('generation', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
        )
        return self._meta("generation")

    def _meta(self, name: str) -> int:
        (value,) = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(value)


def _why(path: Path, error: sqlite3.Error) -> str:
    """What an operator can do about a database that fails."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"{path} is locked by another program (a backup, a shell); end it and try again"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"{path} cannot be opened for writing: {error}"
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return f"{path} cannot be written: {error}; is the disk full?"
    return f"{path} is damaged ({error}); restore a copy of it, or move it away to begin with no deployed models"
