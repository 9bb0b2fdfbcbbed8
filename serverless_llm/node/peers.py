"""What the agents said of themselves, as far as only operators need it: pids, bytes moved, memory in use."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from serverless_llm import wire
from serverless_llm.node.links import WebSocketLink


@dataclass(slots=True)
class Peer:
    """One connected agent.

    Attributes:
        number: in addresses.
        workers: by device, those that are up.
        kv: by device, bytes of KV in use and free, as last reported.
        preemptions: by device and model, since the start of the worker that last reported.
    """

    number: int
    link: WebSocketLink
    hello: wire.Hello
    beat: wire.Heartbeat | None = None
    workers: dict[int, wire.WorkerState] = field(default_factory=dict)
    kv: dict[int, tuple[int, int]] = field(default_factory=dict)
    preemptions: dict[int, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._up(self.hello.workers)

    def hear(self, message: wire.Message) -> None:
        """Takes note of a message of this agent or its workers."""
        match message:
            case wire.Heartbeat():
                self.beat = message
                self._up(message.workers)
            case wire.WorkerUp(device, incarnation, pid, numerics_id):
                self.workers[device] = wire.WorkerState(device, incarnation, pid, 0, numerics_id, [])
            case wire.WorkerLost(device):
                self.workers.pop(device, None)
                self.kv.pop(device, None)
            case wire.Progress():
                self.kv[message.device] = message.kv_used, message.kv_free
                self.preemptions[message.device] = message.preemptions
            case _:
                return

    def _up(self, workers: list[wire.WorkerState]) -> None:
        self.workers = {one.device: one for one in workers if one.incarnation}

    @property
    def resident_bytes(self) -> int:
        return self.beat.dram_used if self.beat else sum(size for _, size in self.hello.resident)

    @property
    def link_bytes(self) -> dict[str, int]:
        """Bytes moved over each link since the agent's start."""
        return self.beat.link_bytes if self.beat else {}

    @property
    def digests(self) -> list[str]:
        """Checkpoints whose digests the node knows."""
        return self.beat.digests if self.beat else []

    @property
    def verified(self) -> dict[str, int]:
        """As in `check.Tally`."""
        return self.beat.verified if self.beat else {}

    @property
    def own_bytes(self) -> dict[str, int]:
        """Of checkpoints, what no other of the node has."""
        return self.beat.own if self.beat else {}


def quoted(message: wire.Message) -> dict[str, object]:
    """A message as a JSON object, fields by name."""
    return {name: msgspec.to_builtins(getattr(message, name)) for name in message.__struct_fields__}
