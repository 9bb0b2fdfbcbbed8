"""What the machine knows. Only the machine changes it; anyone may read it between two calls of `handle`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from serverless_llm.cluster.ledger import Charge, Ledger
from serverless_llm.cluster.timers import Timers
from serverless_llm.cluster.transitions import NodeState, ReplicaState, SequenceState
from serverless_llm.domain import (
    CheckpointId,
    DeviceId,
    DeviceSpec,
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

History = deque[tuple[float, str]]

STARTING = frozenset({ReplicaState.CLAIMING, ReplicaState.RESERVING, ReplicaState.LOADING})
PLANNED = STARTING | {ReplicaState.READY}  # has a claim on memory
ACTUAL = frozenset(ReplicaState) - {ReplicaState.CLAIMING, ReplicaState.GONE}  # may hold memory now
ON_WORKER = frozenset({SequenceState.DISPATCHED, SequenceState.RUNNING})


@dataclass(slots=True, eq=False)
class Sequence:
    """One running generation, as the control plane sees it.

    Attributes:
        revision: of its model when it arrived: its tokens mean nothing to another.
        order: arrivals are numbered; a sequence keeps its place in its queue whatever happens to it.
        epoch: bumped whenever its owner is taken away.
        replica: whom it is dispatched to, None while it waits.
        generated: tokens known to be generated.
        mentioned: when its worker last spoke of it, or when it was dispatched.
        absent_since: its worker's reports leave it out since then.
        kv_bytes: what its KV takes, once a worker gave it back as it had not that much; 0 before.
        dispatched: when it last was.
        resumed_at: tokens it had then.
        deaths: charges: workers that died with it, as far as neither a trial nor a long life has cleared it.
        longest_charged: seconds of the longest run that ended so.
    """

    id: SequenceId
    model: ModelName
    revision: int
    order: int
    arrived: float
    work_class: WorkClass
    keep_alive: float | None
    history: History
    state: SequenceState = SequenceState.TOKENISING
    epoch: int = 1
    prompt_tokens: int = 0
    max_tokens: int = 0
    replica: Replica | None = field(default=None, repr=False)
    generated: int = 0
    mentioned: float = 0.0
    absent_since: float | None = None
    refusals: int = 0
    kv_bytes: int = 0
    dispatched: float = 0.0
    resumed_at: int = 0
    deaths: int = 0
    longest_charged: float = 0.0


@dataclass(slots=True, eq=False)
class Replica:
    """One model resident, or on its way, on one device.

    Attributes:
        revision: of the model that it serves.
        grant: bytes that it takes of the device: weights and KV floor.
        shared: of these, extents that another replica there refers to as well, or did.
        keep_alive: seconds, as the last sequence or, since then, a deploy wished.
        solicited: its load goes on though nobody waits (`min_replicas`, an operator).
        online: somebody waits, or waited, for its load: its bytes go before those of loads that nobody waits for.
        retiring: why it takes no new sequences, empty while it does.
        draining_for: a model that waits for its memory; it takes no new sequences.
        absent_since: its node's heartbeats leave it out since then.
        promises: sequences for whose KV room is kept beyond the floor, and what that takes.
        progress_done: bytes of its load that are done, of `progress_total`.
        left_s: seconds without news after which its load counts as stuck, while others go before it.
    """

    id: ReplicaId
    model: ModelName
    revision: int
    device: DeviceId
    checkpoint: CheckpointId
    footprint: Footprint
    dtype: str
    source: str
    kv_floor: int
    state: ReplicaState
    decided_at: float
    history: History
    keep_alive: float
    verify: str = "off"
    solicited: bool = False
    online: bool = True
    predicted_s: float = 0.0
    left_s: float = 0.0
    ready_at: float = 0.0
    idle_since: float = 0.0
    phases: LoadPhases | None = None
    progress_done: int = 0
    progress_total: int = 0
    retiring: str = ""
    draining_for: ModelName = ""
    absent_since: float | None = None
    shared: tuple[Charge, ...] = ()
    running: dict[SequenceId, Sequence] = field(default_factory=dict, repr=False)
    promises: dict[SequenceId, int] = field(default_factory=dict, repr=False)

    @property
    def grant(self) -> int:
        return self.footprint.weight_bytes + self.kv_floor

    @property
    def charges(self) -> list[Charge]:
        """`grant`, as the ledgers of its device have it: each extent that may have other holders, and the rest."""
        return [(self.id, self.grant - sum(size for _, size in self.shared)), *self.shared]

    @property
    def promised(self) -> Charge:
        """What `planned` of its device has beside its grant."""
        return ("promised", self.id), max(0, max(self.promises.values(), default=0) - self.kv_floor)


@dataclass(slots=True, eq=False)
class Device:
    """One device.

    Attributes:
        incarnation: of its worker; 0 while none is up.
        lost: the highest incarnation known to be dead: incarnations of a device only rise.
        failed_boots: workers in a row that died before they were up.
        cause: why the last worker died.
        killing: its worker was told to die.
        drained: an operator wants it empty.
        planned: grants of the replicas that have a claim, and what they promised sequences; those that leave do not
            count, what they share counts once.
        actual: grants of the replicas that may hold memory now; what they share counts once.
        trial: the sequence or the load ("sequence" | "load", id) that has it for itself.
        isolated_at: when the latest trial began.
        court_at: when the next one may, while others want the device.
        recalled: sequences that were taken back from its worker, which may still be in a step with them.
        avoid_until: its worker refused to make room.
        shortfall: bytes of the budget that it turned out not to have, for a while.
    """

    id: DeviceId
    spec: DeviceSpec
    planned: Ledger
    actual: Ledger
    incarnation: int = 0
    lost: int = 0
    failed_boots: int = 0
    cause: str = ""
    killing: bool = False
    drained: bool = False
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict, repr=False)
    trial: tuple[str, int] | None = None
    isolated_at: float = 0.0
    court_at: float = 0.0
    recalled: set[SequenceId] = field(default_factory=set)
    avoid_until: float = 0.0
    shortfall: int = 0
    absent_since: float | None = None

    @property
    def view(self) -> bool:
        return self.spec.weights == "view"

    @property
    def usable(self) -> bool:
        return self.incarnation > 0 and not self.killing

    @property
    def open(self) -> bool:
        """Whether anything new may come."""
        return self.usable and not self.drained

    @property
    def problem(self) -> str:
        """That it has no worker, and why; empty while it has one."""
        if self.incarnation:
            return ""
        tries = f" ({self.failed_boots} boots failed)" if self.failed_boots else ""
        return f"{self.id} is not up{tries}: {self.cause or 'its worker is starting'}"


@dataclass(slots=True, eq=False)
class Node:
    """One node.

    Attributes:
        heard: when its last heartbeat came.
        planned_dram, actual_dram: as of a device; each checkpoint that view mode pins counts once.
        resident: bytes of checkpoints in DRAM.
        lent: bytes that a load need not read beside those, since other checkpoints that are resident have them.
        away: of checkpoints that loads here read from servers, bytes that no disk has yet.
        overhead_s: what a start here takes beside moving bytes, learned.
    """

    spec: NodeSpec
    state: NodeState
    history: History
    heard: float
    planned_dram: Ledger
    actual_dram: Ledger
    overhead_s: float
    devices: dict[int, Device] = field(default_factory=dict, repr=False)
    resident: dict[CheckpointId, int] = field(default_factory=dict)
    lent: dict[CheckpointId, int] = field(default_factory=dict)
    away: dict[CheckpointId, int] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)

    def held(self, checkpoint: CheckpointId, verify: str) -> int:
        """Bytes of a checkpoint that a load would find in DRAM. What is verified is read whole, whatever is lent."""
        return self.resident.get(checkpoint, 0) + (self.lent.get(checkpoint, 0) if verify == "off" else 0)

    def remote(self, footprint: Footprint) -> int:
        """Bytes of a checkpoint that only a server has, as far as is known."""
        return self.away.get(footprint.checkpoint, footprint.remote_bytes)


@dataclass(slots=True, eq=False)
class Model:
    """One deployed name.

    Attributes:
        waiting: sequences that can be dispatched, by arrival.
        unready: sequences that cannot: their prompts are being tokenised, they rest, or they await their trial.
        cramped: those of both whose KV a worker had no room for.
        requested_at: an operator asked for a replica then.
        error: why its last load failed, empty once one succeeded.
        cool_until: no start before; `math.inf` until an operator loads or deploys it.
        expiries: loads in a row that got stuck.
        load_deaths: workers that died in a row while it was loading there.
        drains: replicas that take no new sequences, so that this model gets their room.
        switches: when its place was taken though it was in use.
    """

    spec: ModelSpec
    footprint: Footprint
    revision: int
    waiting: list[Sequence] = field(default_factory=list, repr=False)
    unready: dict[SequenceId, Sequence] = field(default_factory=dict, repr=False)
    cramped: dict[SequenceId, Sequence] = field(default_factory=dict, repr=False)
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict, repr=False)
    requested_at: float | None = None
    error: str = ""
    cool_until: float = 0.0
    failures: int = 0
    convictions: int = 0
    expiries: int = 0
    load_deaths: int = 0
    drains: tuple[ReplicaId, ...] = ()
    switches: deque[float] = field(default_factory=deque)

    @property
    def demand(self) -> int:
        return len(self.waiting) + len(self.unready)

    def present(self) -> list[Replica]:
        """Replicas of this revision that serve or will serve."""
        return [
            r for r in self.replicas.values() if r.state in PLANNED and r.revision == self.revision and not r.retiring
        ]

    def ready(self) -> list[Replica]:
        return [replica for replica in self.present() if replica.state is ReplicaState.READY]

    def places(self) -> int:
        """How many sequences could begin to run once the replicas that start are up. Without any that takes new ones,
        those of the one to come."""
        most = self.spec.max_concurrency
        taking = [replica for replica in self.present() if not replica.draining_for]
        return sum(most - len(replica.running) for replica in taking) if taking else most

    def spare(self) -> int:
        """Places to be left beside those who wait: where none may wait, whoever finds none is refused."""
        return 0 if self.spec.max_queue else 1

    def eldest(self) -> float | None:
        """When the first of those who wait arrived; an operator's request counts as one."""
        heads = [self.waiting[0].arrived] if self.waiting else []
        heads += [sequence.arrived for sequence in self.unready.values()]
        heads += [] if self.requested_at is None else [self.requested_at]
        return min(heads, default=None)


@dataclass(slots=True, eq=False)
class State:
    """Everything. What is over (done sequences, gone replicas and nodes) is not in here."""

    models: dict[ModelName, Model] = field(default_factory=dict)
    sequences: dict[SequenceId, Sequence] = field(default_factory=dict)
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict)
    nodes: dict[NodeId, Node] = field(default_factory=dict)
    devices: dict[DeviceId, Device] = field(default_factory=dict)
    suspects: dict[SequenceId, Sequence] = field(default_factory=dict)  # to be tried alone, or on trial
    hungry: dict[ModelName, None] = field(default_factory=dict)  # want a replica, found no room
    drained: set[NodeId] = field(default_factory=set)  # also of nodes that are not there
    largest: int = 0  # budget of the largest device
    timers: Timers = field(default_factory=Timers)
    next_replica: int = 1
    next_revision: int = 1
    next_order: int = 1
