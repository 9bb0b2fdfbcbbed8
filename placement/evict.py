"""Who leaves when memory is short, and how long a replica is left alone first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serverless_llm.domain import ReplicaId


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may leave together, and the bytes that this frees.

    Attributes:
        replicas: one replica, or all that pin the same DRAM bytes.
        bring_back_s: seconds that loading them again would take.
        idle_s: seconds since the last of them was used.
    """

    replicas: tuple[ReplicaId, ...]
    bytes: int
    bring_back_s: float
    idle_s: float


def victims(candidates: Iterable[Candidate], needed: int) -> tuple[Candidate, ...] | None:
    """The cheapest candidates that free `needed` bytes: greedy by cost to bring back over idleness.

    Then whoever turned out not to be needed stays, the dearest first. None: all of them together free too little.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=_regret):
        if freed >= needed:
            break
        chosen.append(candidate)
        freed += candidate.bytes
    if freed < needed:
        return None
    for candidate in reversed(tuple(chosen)):
        if freed - candidate.bytes >= needed:
            chosen.remove(candidate)
            freed -= candidate.bytes
    return tuple(chosen)


def _regret(candidate: Candidate) -> tuple[float, tuple[ReplicaId, ...]]:
    return candidate.bring_back_s / (candidate.idle_s + 1e-3), candidate.replicas


def hold_s(bring_back_s: float, floor: float, cap: float) -> float:
    """How long an idle replica is kept while others wait for its memory: as long as bringing it back would take.

    The ski-rental rule (Karlin et al. 1988): never worse than twice the best that could be done knowing the future.
    """
    return min(cap, max(floor, bring_back_s))


def patience_s(bring_back_s: float, base: float, cap: float, switches: int) -> float:
    """How long a model in steady use keeps its place while others wait; doubles with every recent forced switch."""
    return min(cap, max(base, bring_back_s) * 2.0**switches)
