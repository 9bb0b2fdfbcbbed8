"""One cost, in seconds: how long a start takes on a device, and what the room it needs will cost later."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Links:
    """What was learned of one node: bytes per second of its links, and seconds that a start takes beside its bytes."""

    remote: float
    disk: float
    upload: float
    overhead_s: float


@dataclass(frozen=True, slots=True)
class Start:
    """One start that might be made on one device. All in bytes.

    Attributes:
        queued: what other starts still have to read over the node's disk link.
        missing: of this checkpoint's files, what the node's DRAM does not hold and a disk of it does.
        upload: what crosses to the device; 0 where weights are views into DRAM.
        remote_queued, remote_missing: as the first two, of what only a server has.
    """

    queued: int
    missing: int
    upload: int
    remote_queued: int = 0
    remote_missing: int = 0


def startup_s(start: Start, links: Links) -> float:
    """Seconds until the replica serves. Network, disk and upload overlap, so that only the slowest counts in full.

    A start with nothing to read over a link does not wait for it.
    """
    remote_s = (start.remote_queued + start.remote_missing) / links.remote if start.remote_missing else 0.0
    disk_s = (start.queued + start.missing) / links.disk if start.missing else 0.0
    return max(remote_s, disk_s, start.upload / links.upload) + links.overhead_s


def reuse(idle_s: float, half_s: float) -> float:
    """How likely a replica idle for `idle_s` is wanted again soon: 1 when just used, 1/2 after `half_s`."""
    return half_s / (half_s + idle_s)


def learn(known: float | None, sample: float, weight: float) -> float:
    """An exponentially weighted mean; the first sample stands for itself."""
    return sample if known is None else known + weight * (sample - known)
