"""What the machine wants done: its only output. Each command ends in one event, or in the expiry of its deadline."""

from __future__ import annotations

from dataclasses import dataclass

from serverless_llm.domain import CheckpointId, DeviceId, LoadPhases, ModelName, NodeId, ReplicaId, SequenceId


@dataclass(frozen=True, slots=True)
class Reserve:
    """The worker of `device` frees `bytes` above its KV floors for a replica -> Reserved | Refused."""

    device: DeviceId
    replica: ReplicaId
    bytes: int


@dataclass(frozen=True, slots=True)
class StartLoad:
    """-> LoadProgress*, then ReplicaReady | LoadFailed. `online`: somebody waits, so that its bytes go first."""

    replica: ReplicaId
    device: DeviceId
    model: ModelName
    source: str
    checkpoint: CheckpointId
    dtype: str
    kv_floor: int
    online: bool = True
    verify: str = "off"


@dataclass(frozen=True, slots=True)
class Hasten:
    """Somebody waits by now for a load that was begun for nobody. No answer is awaited."""

    replica: ReplicaId
    device: DeviceId


@dataclass(frozen=True, slots=True)
class Unload:
    """Free a replica, or end its load -> Unloaded (also for a replica that the node does not know)."""

    replica: ReplicaId
    device: DeviceId


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The gateway attaches prompt and tokens -> FirstToken, SequenceDone | SequenceRefused.

    `queue_s`: from arrival to now. `phases`: of the load that it waited for, None when warm.
    """

    sequence: SequenceId
    epoch: int
    replica: ReplicaId
    device: DeviceId
    queue_s: float
    phases: LoadPhases | None


@dataclass(frozen=True, slots=True)
class GivenBack:
    """Its worker does not run the sequence, or no longer: it waits again. For logs, events and metrics."""

    sequence: SequenceId
    model: ModelName
    device: DeviceId
    why: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The worker stops the sequence, of this or an older epoch. No answer is awaited: Progress shows it gone."""

    device: DeviceId
    sequence: SequenceId
    epoch: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The one terminal answer of a sequence that does not run (on). `retry`: the client may try again."""

    sequence: SequenceId
    status: int
    code: str
    message: str
    retry_after: float | None
    retry: bool


@dataclass(frozen=True, slots=True)
class KillWorker:
    """A worker that did not answer -> WorkerLost."""

    device: DeviceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class DropNode:
    """A node that did not answer: its link is closed -> NodeLost."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Forget:
    """No model names this checkpoint any more: it leaves the DRAM tier of `node`."""

    node: NodeId
    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class WakeAt:
    """A Tick is wanted at this time; an earlier `WakeAt` is replaced."""

    at: float


@dataclass(frozen=True, slots=True)
class Decided:
    """For the log and the metrics: where a replica starts, at what predicted cost, and what leaves for it."""

    replica: ReplicaId
    model: ModelName
    device: DeviceId
    predicted_s: float
    victims: tuple[ReplicaId, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """For the log and the metrics: how a start went. `tier`: where its bytes came from."""

    replica: ReplicaId
    model: ModelName
    device: DeviceId
    predicted_s: float
    actual_s: float
    phases: LoadPhases


@dataclass(frozen=True, slots=True)
class Evicted:
    """For the log and the metrics. `reason`: memory, keep-alive, unload, delete, abandoned, rollover, drain."""

    replica: ReplicaId
    model: ModelName
    device: DeviceId
    reason: str


Command = (
    Reserve
    | StartLoad
    | Hasten
    | Unload
    | Dispatch
    | GivenBack
    | Cancel
    | Reject
    | KillWorker
    | DropNode
    | Forget
    | WakeAt
    | Decided
    | Outcome
    | Evicted
)
