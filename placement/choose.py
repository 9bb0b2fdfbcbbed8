"""Where a replica starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serverless_llm.domain import DeviceId, ReplicaId


@dataclass(frozen=True, slots=True)
class Option:
    """One device: seconds until the replica serves there, expected ones to bring back what leaves, and who leaves."""

    device: DeviceId
    startup_s: float
    evict_s: float
    victims: tuple[ReplicaId, ...]


def best(options: Iterable[Option]) -> Option | None:
    """The least cost in seconds; equal ones by device id. None where there is no option."""
    return min(options, key=lambda option: (option.startup_s + option.evict_s, option.device), default=None)
