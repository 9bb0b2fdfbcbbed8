"""How many replicas a model should have."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Want(Enum):
    NOTHING = auto()
    MORE = auto()  # one would do good: takes free room and long idle replicas' room only
    FIRST = auto()  # somebody waits and nothing serves: may also claim the room of a model in use, after a while


@dataclass(frozen=True, slots=True)
class Demand:
    """One model's replicas and waiters.

    Attributes:
        waiting: sequences not dispatched.
        requested: an operator asked for a replica.
        present: replicas that serve or will serve, those in `starting` included.
        room: sequences that replicas which serve could take at once.
        starting: replicas on their way.
        spare: places to be left beside those who wait.
    """

    waiting: int
    requested: bool
    present: int
    room: int
    starting: int
    min_replicas: int
    max_replicas: int
    spare: int


def wanted(demand: Demand) -> Want:
    """One more replica? While one is on its way only `min_replicas` asks for another."""
    if demand.present == 0 and (demand.waiting or demand.requested):
        return Want.FIRST
    if demand.present < demand.min_replicas:
        return Want.MORE
    crowded = demand.waiting + demand.spare > demand.room and not demand.starting
    return Want.MORE if crowded and 0 < demand.present < demand.max_replicas else Want.NOTHING
