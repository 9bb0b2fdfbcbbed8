"""Deadlines by key: one heap, entries that were replaced or cancelled are dropped when they surface."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator

Key = tuple[str, Hashable]  # what the deadline is of: kind and id


class Timers:
    """At most one deadline per key. Equal times fire in the order in which they were armed."""

    __slots__ = ("_armed", "_heap", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._armed: dict[Key, tuple[float, int]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._armed)

    def __contains__(self, key: Key) -> bool:
        return key in self._armed

    def arm(self, key: Key, at: float) -> None:
        """Arm the deadline of `key`, in place of an earlier one."""
        self._serial += 1
        self._armed[key] = (at, self._serial)
        heapq.heappush(self._heap, (at, self._serial, key))
        if len(self._heap) > 2 * len(self._armed) + 64:
            self._heap = [(at, serial, key) for key, (at, serial) in self._armed.items()]
            heapq.heapify(self._heap)

    def disarm(self, key: Key) -> None:
        self._armed.pop(key, None)

    def at(self, key: Key) -> float | None:
        """When the deadline of `key` is, None where it has none."""
        armed = self._armed.get(key)
        return None if armed is None else armed[0]

    def earliest(self) -> float | None:
        while self._heap and self._armed.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Key]:
        """Keys whose time has come, each disarmed as it is given."""
        while (at := self.earliest()) is not None and at <= now:
            key = self._heap[0][2]
            del self._armed[key]
            yield key
