"""How much memory there is: on the machine, and in the control groups (version 1 or 2) above this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class _Group(NamedTuple):
    """One control group's folder, and what its version calls its limits, its usage and its page cache."""

    folder: Path
    limits: tuple[str, ...]
    usage: str
    cache: frozenset[str]

    def limit(self) -> int | None:
        """Bytes; None where it has none. At `memory.high` the kernel slows a group down until it is of no use."""
        texts = (text for name in self.limits for text in _lines(self.folder / name))
        return min((int(text) for text in texts if text.isdigit()), default=None)

    def used(self) -> int:
        """Bytes that cannot be had again by forgetting what files hold."""
        fields = (line.partition(" ") for line in _lines(self.folder / "memory.stat"))
        cached = sum(int(value) for name, _, value in fields if name in self.cache)
        return sum(map(int, _lines(self.folder / self.usage))) - cached


def available_memory(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """The smaller of the machine's available memory and the tightest limit, in bytes."""
    limits = (group.limit() for group in _above(proc, groups))
    return min([*_machine(proc), *(limit for limit in limits if limit is not None)])


def headroom(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Bytes that this process can take before the machine or a control group has no more."""
    left = [limit - group.used() for group in _above(proc, groups) if (limit := group.limit()) is not None]
    return min([*_machine(proc), *left], default=sys.maxsize)


def _machine(proc: Path) -> list[int]:
    fields = (line.split() for line in _lines(proc / "meminfo"))
    return [int(field[1]) * 1024 for field in fields if field[:1] == ["MemAvailable:"]]


def _above(proc: Path, groups: Path) -> Iterator[_Group]:
    """The control groups that this process is in, each with those around it."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        root = groups / "memory" if controllers else groups
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            yield _old(place) if controllers else _new(place)
            if place == root:
                break


def _new(folder: Path) -> _Group:
    names = "memory.max", "memory.high"
    return _Group(folder, names, "memory.current", frozenset({"active_file", "inactive_file"}))


def _old(folder: Path) -> _Group:
    names = ("memory.limit_in_bytes",)
    return _Group(folder, names, "memory.usage_in_bytes", frozenset({"total_active_file", "total_inactive_file"}))


def _lines(path: Path) -> list[str]:
    """The lines of a small file; none when it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
