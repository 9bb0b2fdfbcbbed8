"""How fast a link is, learned from the transfers that crossed it. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

WEIGHT = 0.3  # of the newest transfer; arbitrary: three transfers halve an old belief
MINIMUM = 1 << 20  # bytes; a shorter transfer tells of latency, not of bandwidth
REMOTE_BPS = 1.25e8  # bytes per second, until one was learned: a gigabit of network
DISK_BPS = 1e9  # a modest NVMe drive


class Priority(IntEnum):
    """Whose bytes cross a link first."""

    ONLINE = 0  # somebody waits
    PREFETCH = 1


class Rank(NamedTuple):
    """Whose bytes cross a link first: of equal priorities the lower number, a replica's; then who came first."""

    priority: int = Priority.ONLINE
    number: int = 0


def byte_s(remote: float, network: float, disk: float) -> float:
    """Seconds that each byte of a checkpoint takes to come back to DRAM.

    Args:
        remote: the share of its bytes that only a server has; a disk has the rest. They come at once, as placement
            reckons with, so that the slower link counts.
        network, disk: bytes per second.
    """
    return max(remote / network, (1 - remote) / disk)


class Link:
    """One link. `bandwidth`: bytes per second, 0 before the first transfer; `bytes`: moved since the start."""

    def __init__(self) -> None:
        self.bandwidth = 0.0
        self.bytes = 0

    def observe(self, nbytes: int, seconds: float) -> None:
        """One finished transfer."""
        self.bytes += nbytes
        if nbytes < MINIMUM or seconds <= 0:
            return
        rate = nbytes / seconds
        self.bandwidth = rate if not self.bandwidth else self.bandwidth + WEIGHT * (rate - self.bandwidth)
