"""Who holds how much of a capacity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

Charge = tuple[Hashable, int]  # a key, and its bytes


def extent(number: int, size: int) -> Charge:
    """What of a device several replicas may refer to."""
    return ("extent", number), size


@dataclass(slots=True)
class Ledger:
    """Bytes held by key. A key held several times counts once, and stays until the last holder has let go."""

    capacity: int
    used: int = 0
    held: dict[Hashable, tuple[int, int]] = field(default_factory=dict)  # key -> (holders, bytes)

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def add(self, key: Hashable, size: int) -> None:
        holders, held = self.held.get(key, (0, size))
        if not holders:
            self.used += size
        self.held[key] = (holders + 1, held)

    def remove(self, key: Hashable) -> None:
        holders, held = self.held.pop(key)
        if holders > 1:
            self.held[key] = (holders - 1, held)
        else:
            self.used -= held

    def missing(self, *charges: Charge) -> int:
        """Bytes that must be freed before these can be added; 0 or less where there is room."""
        return sum(0 if key in self.held else size for key, size in charges) - self.free

    def freed(self, charges: Iterable[Charge]) -> int:
        """Bytes that are free when these holders, and no others, have let go."""
        leaving = Counter(key for key, _ in charges)
        return sum(self.held[key][1] for key, count in leaving.items() if self.held[key][0] == count)
