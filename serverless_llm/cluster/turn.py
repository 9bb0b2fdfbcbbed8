"""One call of `handle`: the state it works on, the time, and what came out so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from serverless_llm.cluster.commands import Command
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import Device, History, State
from serverless_llm.domain import DeviceId, ModelName, ReplicaId


@dataclass(slots=True)
class Turn:
    """Handlers change `state`, append to `commands`, and name what the scheduling pass must look at.

    Attributes:
        dirty: models whose waiters or replicas changed.
        idled: replicas whose last sequence left.
        room: memory was freed, or can be: models that found none look again.
    """

    state: State
    policy: Policy
    now: float
    commands: list[Command] = field(default_factory=list)
    dirty: dict[ModelName, None] = field(default_factory=dict)
    room: bool = False
    idled: list[ReplicaId] = field(default_factory=list)

    def emit(self, command: Command) -> None:
        self.commands.append(command)

    def touch(self, model: ModelName) -> None:
        self.dirty[model] = None

    def arm(self, kind: str, key: Hashable, after: float) -> None:
        self.state.timers.arm((kind, key), self.now + after)

    def disarm(self, kind: str, key: Hashable) -> None:
        self.state.timers.disarm((kind, key))

    def history(self) -> History:
        return deque(maxlen=self.policy.history)

    def device(self, device: DeviceId) -> Device:
        return self.state.devices[device]
