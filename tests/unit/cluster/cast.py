"""Who plays in the driver's world, and when: what a worker, an agent and a client remember."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import CheckpointId, DeviceId, ModelName, NodeSpec, ReplicaId, SequenceId

GIB = 1 << 30


class Time:
    """What happens when. `now` only moves in `run`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], object]]] = []
        self.serial = 0

    def at(self, when: float, action: Callable[[], object]) -> None:
        self.serial += 1
        heapq.heappush(self.queue, (max(when, self.now), self.serial, action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.at(self.now + seconds, action)

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            when, _, action = heapq.heappop(self.queue)
            self.now = when
            action()
        self.now = end


@dataclass(frozen=True)
class Faults:
    """Chances per frame, and the longest extra delay in seconds (which reorders)."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.0


@dataclass(eq=False)
class Run:
    """A sequence on a worker: a token at `begun + prefill_s`, and one each `token_s` after it."""

    sequence: SequenceId
    epoch: int
    replica: ReplicaId
    base: int
    begun: float
    live: bool = True


@dataclass(eq=False)
class Worker:
    device: DeviceId
    budget: int
    incarnation: int
    replicas: dict[ReplicaId, e.HeldReplica] = field(default_factory=dict)
    loading: set[ReplicaId] = field(default_factory=set)
    taken: dict[ReplicaId, int] = field(default_factory=dict)  # but for extents
    extents: dict[ReplicaId, dict[str, int]] = field(default_factory=dict)  # by what is in them
    made: int = 0  # extents
    runs: dict[SequenceId, Run] = field(default_factory=dict)
    up: bool = True

    def find(self, content: str) -> tuple[int, ReplicaId] | None:
        """The extent with this content, and a replica that serves from it."""
        ready = (name for name in self.replicas if content in self.extents.get(name, {}))
        return next(((self.extents[name][content], name) for name in ready), None)

    def alone(self, replica: ReplicaId, sizes: Mapping[str, int]) -> int:
        """Bytes that it takes where nothing else is."""
        return self.taken[replica] + sum(sizes[content] for content in self.extents[replica])

    def used(self, sizes: Mapping[str, int]) -> int:
        """Bytes. `sizes`: of contents."""
        extents = {number: sizes[content] for held in self.extents.values() for content, number in held.items()}
        return sum(self.taken.values()) + sum(extents.values())


@dataclass(eq=False)
class Agent:
    spec: NodeSpec
    workers: dict[int, Worker]
    resident: dict[CheckpointId, int] = field(default_factory=dict)
    link: int = 0  # 0: not connected
    up: bool = True
    cut: bool = False


@dataclass(eq=False)
class Client:
    """One request at the gateway: its token log, its current epoch, and how it ended. `kv`: bytes beyond the floor."""

    model: ModelName
    checkpoint: CheckpointId
    prompt: int
    tokens: int
    arrived: float
    then: Callable[[], object] | None
    kv: int = 0
    log: int = 0
    epoch: int = 0
    end: str = ""
    ended: float = 0.0
    reject: c.Reject | None = None
    dispatches: list[c.Dispatch] = field(default_factory=list)
