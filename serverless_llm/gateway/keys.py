"""Keys: who may call, for what, and how much. Only digests of them are kept in memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from serverless_llm import strict_yaml
from serverless_llm.config import expand, in_words
from serverless_llm.errors import ConfigurationError, did_you_mean

Scope = Literal["inference", "admin"]
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        id: what logs call it.
        digest: SHA-256 of its text.
        requests_per_minute, tokens_per_minute: None: no limit. Tokens are those of prompts and of answers.
        concurrency: requests that may run or wait at a time, each as often as it has choices; None: any number.
    """

    id: str
    digest: bytes
    scopes: frozenset[str] = frozenset(("inference",))
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key in the file: its text, or the SHA-256 of it in hexadecimal."""

    id: str
    key: str | None = None
    sha256: str | None = None
    scopes: tuple[Scope, ...] = ("inference",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


def digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def full(text: str) -> Key:
    """The one key of a server without a file of keys: it opens everything."""
    return Key("default", digest(text.encode()), frozenset(("inference", "admin")))


def read(path: Path, environ: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of a YAML file. `${env.NAME}` in it is replaced by that variable.

    Raises:
        ConfigurationError: names the file, and the key at fault by its id.
    """
    try:
        text, mode = path.read_text(), path.stat().st_mode
        raw = strict_yaml.load(text)
    except (OSError, UnicodeDecodeError, strict_yaml.YAMLError) as error:
        raise ConfigurationError(f"keys file {path}: {_plain(error)}") from None
    if not isinstance(raw, list) or not raw:  # without a key everybody on this machine may call
        raise ConfigurationError(f"keys file {path}: a list of keys is needed")
    if mode & 0o077 and any(_is_secret(entry) for entry in raw):
        raise ConfigurationError(f"keys file {path}: it holds keys and others may read it; chmod 600 {path}")
    try:
        entries = expand(raw, environ)
    except ConfigurationError as error:
        raise ConfigurationError(f"keys file {path}: {error}") from None
    keys = tuple(_key(entry, number, path) for number, entry in enumerate(entries, 1))
    for what, count in Counter(one for key in keys for one in (key.id, key.digest)).items():
        if count > 1:
            named = f"the id {what!r}" if isinstance(what, str) else "one of the keys"
            raise ConfigurationError(f"keys file {path}: {named} is there {count} times")
    return keys


def _plain(error: Exception) -> str:
    """What is wrong, without the text around it, which may be a key."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        repeated = isinstance(error, strict_yaml.RepeatedKeyError)
        return f"line {mark.line + 1} {'repeats a key of its mapping' if repeated else 'is no YAML'}"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no text in UTF-8"


def _is_secret(entry: Any) -> bool:
    """Whether an entry holds the text of a key, not a reference to a variable or a digest."""
    text = entry.get("key") if isinstance(entry, dict) else None
    return text is not None and not re.fullmatch(r"\$\{env\.\w+\}", str(text))


def _key(raw: Any, number: int, path: Path) -> Key:
    where = f"keys file {path}: key {raw.get('id', number) if isinstance(raw, dict) else number}"
    for name in raw if isinstance(raw, dict) else ():
        if name not in _Entry.__struct_fields__:
            near = did_you_mean(str(name), _Entry.__struct_fields__)
            raise ConfigurationError(f"{where}: unknown key {str(name)!r}{near}")
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        place, what = in_words(error, _Entry)
        named = f"{where}: {place[1:]}" if place else where
        raise ConfigurationError(f"{named}: {what}") from None
    if not _ID.fullmatch(entry.id):
        raise ConfigurationError(f"{where}: its id must be 1 to 64 letters, digits and _.-")
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigurationError(f"{where}: give key or sha256")
    if entry.sha256 is not None and not _DIGEST.fullmatch(entry.sha256):
        raise ConfigurationError(f"{where}: sha256 must be 64 hexadecimal digits")
    if entry.key is not None and not entry.key.strip():
        raise ConfigurationError(f"{where}: its key is empty")
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        limit = getattr(entry, name)
        if limit is not None and limit < 1:
            raise ConfigurationError(f"{where}: {name} must be at least 1; leave it out for no limit")
    return Key(
        id=entry.id,
        digest=bytes.fromhex(entry.sha256) if entry.sha256 else digest((entry.key or "").encode()),
        scopes=frozenset(entry.scopes),
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        concurrency=entry.concurrency,
    )
