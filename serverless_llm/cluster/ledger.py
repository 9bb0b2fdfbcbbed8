"""Who holds how much of a capacity."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


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

    def missing(self, key: Hashable, size: int) -> int:
        """Bytes that must be freed before `key` can be added; 0 or less where there is room."""
        return (0 if key in self.held else size) - self.free
