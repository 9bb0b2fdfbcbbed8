"""A machine with nobody around it: a test says what happens, and reads the commands as values."""

from __future__ import annotations

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.invariants import check_invariants
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import DeviceId, DeviceSpec, FinishReason, Footprint, LoadPhases, ModelSpec, NodeSpec

D0, D1 = DeviceId("n0", 0), DeviceId("n0", 1)
KV = 10  # bytes of a block; a floor is one block, because a device has 100
PHASES = LoadPhases(total_s=1.0)
QUIET = Policy(silent_after=1e9)  # nobody minds that a node says nothing
STILL = Policy(silent_after=1e9, mention_s=1e9)  # nor that its workers say nothing of what runs there


def node(name: str = "n0", devices: int = 1, weights: str = "copy", dram: int = 1000) -> NodeSpec:
    return NodeSpec(name, dram, tuple(DeviceSpec(number, "cpu", 100, weights) for number in range(devices)))


def deploy(
    name: str, size: int = 80, checkpoint: str = "", context: int = 1024, remote_bytes: int = 0, **spec: object
) -> e.Deploy:
    footprint = Footprint(checkpoint or f"sha-{name}", size, size, KV, context, remote_bytes=remote_bytes)
    return e.Deploy(ModelSpec(name, f"/{name}", **spec), footprint)  # type: ignore[arg-type]


def kinds(out: list[c.Command]) -> list[str]:
    """The commands' names."""
    return [type(one).__name__ for one in out]


def decided(out: list[c.Command]) -> c.Decided:
    (one,) = (one for one in out if isinstance(one, c.Decided))
    return one


class Desk:
    """`tell` lets `after` seconds pass, then the event happens; `WakeAt`s and `GivenBack`s are left out of what it
    returns."""

    def __init__(self, policy: Policy | None = None, generation: int = 0) -> None:
        self.machine = Machine(policy or Policy())
        self.machine.number_replicas(generation)
        self.now = 0.0
        self.wake = 0.0

    def tell(self, event: e.Event, after: float = 0.0) -> list[c.Command]:
        self.now += after
        out = self.machine.handle(event, self.now)
        check_invariants(self.machine.state)
        self._check_histories()
        self.wake = max([self.wake, *(one.at for one in out if isinstance(one, c.WakeAt))])
        return [one for one in out if not isinstance(one, c.WakeAt | c.GivenBack)]

    def _check_histories(self) -> None:
        """What an InvariantError would tell of a life is in the order of its times."""
        state = self.machine.state
        for lives in (state.sequences, state.replicas, state.nodes):
            for one in lives.values():
                times = [at for at, _ in one.history]
                assert times == sorted(times, key=float)

    def tick(self, after: float) -> list[c.Command]:
        return self.tell(e.Tick(), after)

    def join(self, spec: NodeSpec | None = None, held: tuple[e.HeldReplica, ...] = ()) -> list[c.Command]:
        spec = spec or node()
        workers = tuple((DeviceId(spec.node, device.number), 1) for device in spec.devices)
        return self.tell(e.NodeJoined(spec, workers, held, ()))

    def ask(self, sequence: int, model: str, keep_alive: float | None = None) -> list[c.Command]:
        """A request of 10 + 10 tokens for the model as it is deployed, its prompt ready."""
        known = self.machine.state.models.get(model)
        checkpoint = known.footprint.checkpoint if known else ""
        arrived = self.tell(e.RequestArrived(sequence, model, checkpoint, keep_alive=keep_alive))
        return arrived + self.tell(e.PromptReady(sequence, 10, 10))

    def bring_up(self, replica: int, device: DeviceId = D0) -> list[c.Command]:
        """The worker makes room and the load succeeds."""
        self.tell(e.Reserved(device, replica))
        return self.tell(e.ReplicaReady(replica, PHASES))

    def serve(self, name: str, sequence: int, **spec: object) -> None:
        """Deploy `name` and have it serve a sequence."""
        self.tell(deploy(name, **spec))  # type: ignore[arg-type]
        replica = self.machine.state.next_replica
        self.ask(sequence, name)
        self.bring_up(replica)
        assert sequence in self.machine.state.replicas[replica].running

    def beat(self, *replicas: int, after: float = 0.0, node: str = "n0", incarnation: int = 1) -> list[c.Command]:
        """One heartbeat of a node with one device."""
        workers = ((DeviceId(node, 0), incarnation, replicas),) if incarnation else ()
        return self.tell(e.Heartbeat(node, workers, (), ()), after)


def serving() -> Desk:
    """One device that serves `a` to sequence 1; nobody minds that its node says nothing."""
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1)
    return desk


def idle(desk: Desk, name: str, sequence: int, **spec: object) -> int:
    """Deploy a model and leave it loaded and idle; its replica."""
    replica = desk.machine.state.next_replica
    desk.tell(deploy(name, **spec))  # type: ignore[arg-type]
    desk.ask(sequence, name)
    desk.bring_up(replica, desk.machine.state.replicas[replica].device)
    desk.tell(e.SequenceDone(sequence, 1, FinishReason.STOP, 3))
    return replica


def beside(**spec: object) -> Desk:
    """Sequence 1 runs beside a model of 30 bytes that was idle for longer than it would take to bring back."""
    desk = Desk(STILL)
    desk.join()
    idle(desk, "idle", 9, size=30, **spec)
    desk.tick(5.0)
    desk.serve("a", 1, size=30)
    return desk


def crowd(*sizes: int, budget: int = 150) -> Desk:
    """Sequence 1 of `a` runs beside models `x`, `y` ... that have been idle for a minute."""
    desk = Desk(STILL)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", budget, "copy"),)))
    for name, size in zip("xyz", sizes, strict=False):
        idle(desk, name, ord(name), size=size)
    desk.tick(60.0)
    desk.serve("a", 1, size=30)
    return desk
