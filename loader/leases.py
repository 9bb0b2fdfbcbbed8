"""Versions of the disk tier that stay while somebody uses them: a lock each, held shared by whoever uses it and
exclusively by whoever brings or removes it, in whatever process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from serverless_llm.loader.manifest import CHECKPOINT

LOCK = "lock"  # its time of change is that of the last use


@dataclass(frozen=True, slots=True)
class Lease:
    """A whole checkpoint that stays while this is held.

    Attributes:
        directory: a Hugging Face directory.
        offline: why its server was not asked, if it was not.
    """

    directory: Path
    lock: int
    offline: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.lock)


def lease_of(place: Path, wanted: Callable[[Path], bool] = Path.exists) -> Lease | None:
    """None where the version is not there any more, or is not `wanted`, which is asked once it cannot leave."""
    lock = lock_of(place, fcntl.LOCK_SH)
    if lock is None:
        return None
    try:
        if wanted(place):
            with suppress(OSError):  # a mount that is read-only, from which nothing leaves
                os.utime(lock)
            return Lease(place / CHECKPOINT, lock)
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def lock_of(place: Path, kind: int) -> int | None:
    """A descriptor of a version's lock; None where the version is not there any more or, with LOCK_NB, in use."""
    try:
        lock = _opened(place / LOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, kind)
        if os.path.samestat(os.fstat(lock), (place / LOCK).stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY)  # that can be locked, too
