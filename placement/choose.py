"""Where a replica starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serverless_llm.domain import DeviceId, ReplicaId

CLOSE = 1.05  # estimates that differ by less tell nothing


@dataclass(frozen=True, slots=True)
class Option:
    """One device: seconds until the replica serves there, expected ones to bring back what leaves, and who leaves.

    Attributes:
        crowd: sequences that run on the device, and replicas there.
    """

    device: DeviceId
    startup_s: float
    evict_s: float
    victims: tuple[ReplicaId, ...]
    crowd: tuple[int, int] = (0, 0)

    @property
    def cost_s(self) -> float:
        return self.startup_s + self.evict_s


def best(options: Iterable[Option]) -> Option | None:
    """The least cost in seconds, equal ones by device id; None where there is no option.

    If nobody leaves for it, the least crowded of those that cost about as much and that nobody leaves for either: what
    idles beside a busy device is lost.
    """
    known = sorted(options, key=lambda option: (option.cost_s, option.device))
    if not known or known[0].victims:
        return next(iter(known), None)
    close = [option for option in known if not option.victims and option.cost_s <= CLOSE * known[0].cost_s]
    return min(close, key=lambda option: option.crowd)
