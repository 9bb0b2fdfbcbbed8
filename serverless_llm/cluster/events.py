"""What can happen to the cluster: the machine's only input.

Every event that answers a command names what the command was about (replica, sequence and epoch, device and
incarnation), so that a late, doubled or reordered one is recognised.
"""

from __future__ import annotations

from dataclasses import dataclass

from serverless_llm.domain import (
    CheckpointId,
    DeviceId,
    FinishReason,
    Footprint,
    LoadPhases,
    ModelName,
    ModelSpec,
    NodeId,
    NodeSpec,
    ReplicaId,
    SequenceId,
    WorkClass,
)

# --- operators ---


@dataclass(frozen=True, slots=True)
class Deploy:
    """A new name, or a changed spec of an old one: a changed checkpoint, dtype or context rolls over."""

    spec: ModelSpec
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Delete:
    model: ModelName


@dataclass(frozen=True, slots=True)
class Load:
    """Start a replica though nobody waits (admin)."""

    model: ModelName


@dataclass(frozen=True, slots=True)
class UnloadModel:
    """Take idle replicas off their devices now; busy ones when their sequences end (admin)."""

    model: ModelName


@dataclass(frozen=True, slots=True)
class Pin:
    model: ModelName
    pinned: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Take everything off a node, idle or on its way now, busy when its sequences end, and bring nothing there (admin);
    `drained` False: use it again. Holds whether or not the node is there, until the head restarts."""

    node: NodeId
    drained: bool


# --- requests ---


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A sequence wants `model`; its prompt is being tokenised for `checkpoint`. `keep_alive` overrides the spec's."""

    sequence: SequenceId
    model: ModelName
    checkpoint: CheckpointId
    work_class: WorkClass = WorkClass.ONLINE
    keep_alive: float | None = None


@dataclass(frozen=True, slots=True)
class PromptReady:
    """The sequence can be dispatched."""

    sequence: SequenceId
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """The gateway sent it to its worker with `tokens` generated tokens from its log: how far it truly had come."""

    sequence: SequenceId
    epoch: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    sequence: SequenceId


# --- workers, about sequences ---


@dataclass(frozen=True, slots=True)
class FirstToken:
    sequence: SequenceId
    epoch: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class SequenceDone:
    sequence: SequenceId
    epoch: int
    reason: FinishReason
    tokens: int


@dataclass(frozen=True, slots=True)
class SequenceRefused:
    """The worker does not run this sequence, or no longer: it has no such replica, or no memory for its KV.

    `missing`: bytes that would do if other models left; `never`: its device has too few even then; `begun`: it had its
    memory until weights took it, and may do with less than that.
    """

    sequence: SequenceId
    epoch: int
    why: str
    missing: int = 0
    never: bool = False
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """All sequences that a worker holds: (sequence, epoch, generated tokens, KV blocks)."""

    device: DeviceId
    incarnation: int
    sequences: tuple[tuple[SequenceId, int, int, int], ...]


# --- agents, about replicas ---


@dataclass(frozen=True, slots=True)
class Reserved:
    device: DeviceId
    replica: ReplicaId


@dataclass(frozen=True, slots=True)
class Refused:
    device: DeviceId
    replica: ReplicaId
    missing: int


@dataclass(frozen=True, slots=True)
class LoadProgress:
    replica: ReplicaId
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """It serves. `shared`: extents of its device that another replica brought: number, bytes, which replica."""

    replica: ReplicaId
    phases: LoadPhases
    shared: tuple[tuple[int, int, ReplicaId], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`permanent`: no request is to try it again."""

    replica: ReplicaId
    message: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Unloaded:
    replica: ReplicaId


# --- nodes ---


@dataclass(frozen=True, slots=True)
class HeldReplica:
    """A replica that an agent already holds when it joins (after a head's restart) or reports.

    `shared`: extents of its device that others may refer to, too: number, bytes.
    """

    replica: ReplicaId
    device: DeviceId
    model: ModelName
    checkpoint: CheckpointId
    dtype: str
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class NodeJoined:
    node: NodeSpec
    workers: tuple[tuple[DeviceId, int], ...]  # devices whose worker is up, with its incarnation
    held: tuple[HeldReplica, ...]
    resident: tuple[tuple[CheckpointId, int], ...]


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: NodeId


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Every second: what the node holds.

    Attributes:
        workers: of each that is up, its incarnation and replicas.
        lent: of checkpoints, what a load would not read, since others that are resident have it, too.
        away: of checkpoints that loads here read from servers, bytes that no disk has yet.
    """

    node: NodeId
    workers: tuple[tuple[DeviceId, int, tuple[ReplicaId, ...]], ...]
    resident: tuple[tuple[CheckpointId, int], ...]
    bandwidth: tuple[tuple[str, float], ...]
    lent: tuple[tuple[CheckpointId, int], ...] = ()
    away: tuple[tuple[CheckpointId, int], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerUp:
    device: DeviceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """`charged`: it may have died of what ran there; not so where it went with the forkserver of its node."""

    device: DeviceId
    incarnation: int
    cause: str
    charged: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of a `WakeAt` has come."""


Event = (
    Deploy
    | Delete
    | Load
    | UnloadModel
    | Pin
    | Drain
    | RequestArrived
    | PromptReady
    | Resumed
    | ClientGone
    | FirstToken
    | SequenceDone
    | SequenceRefused
    | Progress
    | Reserved
    | Refused
    | LoadProgress
    | ReplicaReady
    | LoadFailed
    | Unloaded
    | NodeJoined
    | NodeLost
    | Heartbeat
    | WorkerUp
    | WorkerLost
    | Tick
)
