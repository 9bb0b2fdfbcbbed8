"""A cluster in virtual time around the real machine: agents, workers and a gateway that answer its commands.

Links between the head and its agents may drop, delay, double and reorder frames; the gateway's link does not, because
it lives in the head's process. After every event the machine's invariants and the world's own are checked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.invariants import check_invariants
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import (
    CheckpointId,
    DeviceId,
    DeviceSpec,
    FinishReason,
    Footprint,
    LoadPhases,
    ModelName,
    ModelSpec,
    NodeId,
    NodeSpec,
    SequenceId,
)
from tests.unit.cluster.cast import Agent, Client, Faults, Run, Time, Worker

GIB = 1 << 30
CALM = Faults()
BLOCK = 1 << 16


class World(Time):
    """Everything outside the machine. `now` only moves in `run`."""

    def __init__(self, policy: Policy | None = None, faults: Faults = CALM, seed: int = 0) -> None:
        super().__init__()
        self.machine = Machine(policy or Policy())
        self.generation = 0
        self.faults = faults
        self.chance = random.Random(seed)
        self.agents: dict[NodeId, Agent] = {}
        self.clients: dict[SequenceId, Client] = {}
        self.footprints: dict[CheckpointId, Footprint] = {}
        self.shown: dict[ModelName, CheckpointId] = {}  # what the gateway knows to be deployed
        self.log: list[str] = []
        self.said: list[c.Command] = []
        self.loads: list[c.StartLoad] = []
        self.reads: Counter[CheckpointId] = Counter()
        self.deaths = 0
        self.events = 0
        self.poison: dict[SequenceId, float] = {}  # seconds into each run, half as many or half as many more
        self.poison_models: set[ModelName] = set()
        self.broken: dict[ModelName, tuple[str, bool]] = {}  # loads fail: message, permanent
        self.stuck: set[ModelName] = set()  # loads never end
        self.mute: set[type] = set()  # commands that nobody answers
        self.refusing: dict[DeviceId, int] = {}
        self.wake = 0.0
        self.rtt_s, self.load_s, self.prefill_s, self.token_s = 0.001, 0.08, 0.02, 0.01
        self.disk_bps, self.restart_s, self.progress_s = 2.0 * GIB, 0.3, 0.1
        self.catalog_s = 1.0

    def run_until_answered(self, limit: float = 600.0) -> None:
        """Until every request has its end.

        Raises:
            AssertionError: it takes longer than `limit` seconds.
        """
        end = self.now + limit
        while self.open():
            assert self.now < end, [self.machine.state.sequences.get(sequence) for sequence in self.open()]
            self.run(0.25)

    def open(self) -> list[SequenceId]:
        return [sequence for sequence, client in self.clients.items() if not client.end]

    # --- the machine ---

    def handle(self, event: e.Event) -> list[c.Command]:
        """The machine's answer to an event, carried out."""
        self.events += 1
        out = self.machine.handle(event, self.now)
        self.log.append(f"{self.now:.6f} {event!r}")
        self.log += [f"{self.now:.6f}   {command!r}" for command in out]
        self.said += out
        check_invariants(self.machine.state)
        for command in out:
            self._check(command)
            OBEY[type(command)](self, command)
        return out

    def tell(self, event: e.Event) -> None:
        self.handle(event)

    def _check(self, command: c.Command) -> None:
        """What must hold of every command."""
        if isinstance(command, c.Reject) and command.sequence in self.clients:
            assert self.clients[command.sequence].reject is None, "exactly one terminal event per request"
        if isinstance(command, c.Dispatch):
            client = self.clients[command.sequence]
            assert client.reject is None and client.end != "gone", "nothing runs after its end"
            assert command.epoch > client.epoch, "one owner per epoch"
            served = self.machine.state.replicas[command.replica].checkpoint
            assert served == client.checkpoint, "tokens only meet the weights they were made for"
        if isinstance(command, c.Evicted) and command.reason == "memory":
            model = self.machine.state.models[command.model]
            assert not model.spec.pinned, "nothing pinned is evicted"
            replica = self.machine.state.replicas[command.replica]
            assert replica.history[-1][1] == "evict" and not replica.running, "nothing busy or loading is evicted"

    # --- operators and clients ---

    def add_node(
        self,
        name: NodeId = "n0",
        devices: int = 1,
        budget: int = GIB,
        weights: str = "copy",
        dram: int = 64 * GIB,
        held: tuple[e.HeldReplica, ...] = (),
        bandwidth: dict[str, float] | None = None,
    ) -> None:
        specs = tuple(DeviceSpec(number, "cpu", budget, weights) for number in range(devices))
        workers = {number: Worker(DeviceId(name, number), budget, 1) for number in range(devices)}
        agent = Agent(NodeSpec(name, dram, specs, bandwidth or {}), workers)
        for one in held:
            workers[one.device.number].replicas[one.replica] = one
        self.agents[name] = agent
        self.connect(agent)
        self._beat(agent)
        for number in workers:
            self._speak(agent, number)

    def deploy(self, name: ModelName, size: int = 700 << 20, checkpoint: str = "", context: int = 4096, **spec) -> None:  # type: ignore[no-untyped-def]
        footprint = Footprint(checkpoint or f"sha-{name}", size, size, BLOCK, context)
        self.footprints[footprint.checkpoint] = footprint
        self.handle(e.Deploy(ModelSpec(name, f"/models/{name}", **spec), footprint))
        self.shown.setdefault(name, footprint.checkpoint)
        self.after(self.catalog_s, lambda: self.shown.update({name: footprint.checkpoint}))

    def request(
        self,
        model: ModelName,
        tokens: int = 5,
        prompt: int = 10,
        keep_alive: float | None = None,
        then: Callable[[], object] | None = None,
        tokenise_s: float | None = 0.002,
    ) -> SequenceId:
        """A client asks now. `then` is called when it has its answer. `tokenise_s` None: its prompt never is."""
        sequence = len(self.clients) + 1
        checkpoint = self.shown.get(model, "")
        self.clients[sequence] = Client(model, checkpoint, prompt, tokens, self.now, then)
        self.handle(e.RequestArrived(sequence, model, checkpoint, keep_alive=keep_alive))
        if tokenise_s is not None:
            self.after(tokenise_s, lambda: self.tell(e.PromptReady(sequence, prompt, tokens)))
        return sequence

    def hang_up(self, sequence: SequenceId) -> None:
        self._end(sequence, "gone")
        self.handle(e.ClientGone(sequence))

    def _end(self, sequence: SequenceId, how: str) -> None:
        client = self.clients[sequence]
        if not client.end:
            client.end, client.ended = how, self.now
            if client.then is not None:
                self.after(0.003, client.then)

    def took(self, sequence: SequenceId) -> float:
        client = self.clients[sequence]
        return client.ended - client.arrived

    def drain(self, node: NodeId, seconds: float) -> None:
        """An operator has it emptied, and takes it back: or others could wait for ever."""
        self.handle(e.Drain(node, True))
        self.after(seconds, lambda: self.handle(e.Drain(node, False)))

    def restart_head(self) -> None:
        """Clients lose their connections, models are deployed anew, agents dial again with what they hold."""
        for sequence in self.open():
            self._end(sequence, "gone")
        specs = [(model.spec, model.footprint) for model in self.machine.state.models.values()]
        self.generation += 1
        self.machine = Machine(self.machine.policy)
        self.machine.number_replicas(self.generation)
        self.wake = 0.0
        for spec, footprint in specs:
            self.handle(e.Deploy(spec, footprint))
        for number, agent in enumerate(self.agents.values()):
            agent.link = 0
            self.after(0.1 + number, lambda agent=agent: self.connect(agent))  # type: ignore[misc]

    # --- links ---

    def connect(self, agent: Agent) -> None:
        """The agent dials in, with all that it holds."""
        if agent.link or agent.cut or not agent.up:
            return
        self.serial += 1
        agent.link = self.serial
        workers = tuple((worker.device, worker.incarnation) for worker in agent.workers.values() if worker.up)
        held = tuple(one for worker in agent.workers.values() if worker.up for one in worker.replicas.values())
        self.handle(e.NodeJoined(agent.spec, workers, held, tuple(agent.resident.items())))

    def disconnect(self, agent: Agent, again_s: float = 0.2) -> None:
        """The link breaks; the head notices; the agent dials again."""
        if agent.link:
            agent.link = 0
            self.handle(e.NodeLost(agent.spec.node))
        self.after(again_s, lambda: self.connect(agent))

    def _frames(self) -> int:
        if self.chance.random() < self.faults.drop:
            return 0
        return 2 if self.chance.random() < self.faults.duplicate else 1

    def _lag(self) -> float:
        return self.rtt_s / 2 + self.faults.delay_s * self.chance.random() ** 3

    def up_link(self, agent: Agent, event: e.Event) -> None:
        """Agent -> head."""
        link = agent.link
        if agent.cut or not link:
            return
        for _ in range(self._frames()):
            self.after(self._lag(), lambda: self.handle(event) if agent.link == link else None)

    def down_link(self, device: DeviceId, command: c.Command, action: Callable[[Agent, Worker], None]) -> None:
        """Head -> agent."""
        agent = self.agents[device.node]
        link = agent.link
        if agent.cut or type(command) in self.mute:
            return

        def arrive() -> None:
            if link and agent.link == link and agent.up:
                action(agent, agent.workers[device.number])

        for _ in range(self._frames()):
            self.after(self._lag(), arrive)

    def _beat(self, agent: Agent) -> None:
        if agent.up:
            workers = tuple(
                (worker.device, worker.incarnation, tuple(worker.replicas))
                for worker in agent.workers.values()
                if worker.up
            )
            self.up_link(agent, e.Heartbeat(agent.spec.node, workers, tuple(agent.resident.items()), ()))
        self.after(1.0, lambda: self._beat(agent))

    def _speak(self, agent: Agent, number: int) -> None:
        worker = agent.workers[number]
        self._report(agent, worker)
        self.after(self.progress_s if worker.runs else 0.5, lambda: self._speak(agent, number))

    def _report(self, agent: Agent, worker: Worker) -> None:
        if agent.up and worker.up:
            held = tuple((run.sequence, run.epoch, self.tokens(run), 1) for run in worker.runs.values())
            self.up_link(agent, e.Progress(worker.device, worker.incarnation, held))

    # --- workers ---

    def tokens(self, run: Run) -> int:
        """Tokens generated so far, those before this run included."""
        past = self.now - run.begun - self.prefill_s
        made = 0 if past < 0 else 1 + int(past / self.token_s)
        return min(self.clients[run.sequence].tokens, run.base + made)

    def stop(self, worker: Worker, run: Run) -> None:
        client = self.clients[run.sequence]
        if client.epoch == run.epoch:
            client.log = max(client.log, self.tokens(run))
        run.live = False
        if worker.runs.get(run.sequence) is run:
            del worker.runs[run.sequence]

    def kill(self, agent: Agent, worker: Worker, cause: str = "killed") -> None:
        """The worker dies; its agent says so and starts another."""
        if not (worker.up and agent.up):
            return
        self.deaths += 1
        self._wipe(worker)
        self.up_link(agent, e.WorkerLost(worker.device, worker.incarnation, cause))

        def restart() -> None:
            if agent.up and not worker.up:
                worker.up, worker.incarnation = True, worker.incarnation + 1
                self.up_link(agent, e.WorkerUp(worker.device, worker.incarnation))

        self.after(self.restart_s, restart)

    def _wipe(self, worker: Worker) -> None:
        for run in list(worker.runs.values()):
            self.stop(worker, run)
        worker.up = False
        for held in (worker.replicas, worker.loading, worker.taken):
            held.clear()

    def kill_node(self, agent: Agent, back_s: float) -> None:
        """The agent dies with its workers and its DRAM; a new one starts later."""
        if not agent.up:
            return
        for worker in agent.workers.values():
            self._wipe(worker)
        agent.up = False
        agent.resident.clear()

        def back() -> None:
            agent.up = True
            for worker in agent.workers.values():
                worker.up, worker.incarnation = True, 1
            self.connect(agent)

        self.after(0.05, lambda: self.disconnect(agent, again_s=back_s + 1))
        self.after(back_s, back)

    # --- commands ---

    def reserve(self, command: c.Reserve) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            missing = self.refusing.get(worker.device, 0)
            if not worker.up:
                return
            if missing:
                self.up_link(agent, e.Refused(worker.device, command.replica, missing))
            else:
                self.up_link(agent, e.Reserved(worker.device, command.replica))

        self.down_link(command.device, command, arrive)

    def start_load(self, command: c.StartLoad) -> None:
        self.loads.append(command)

        def arrive(agent: Agent, worker: Worker) -> None:
            if worker.up and command.replica not in worker.loading and command.replica not in worker.replicas:
                self._load(agent, worker, command)

        self.down_link(command.device, command, arrive)

    def _load(self, agent: Agent, worker: Worker, command: c.StartLoad) -> None:
        footprint = self.footprints[command.checkpoint]
        grant = footprint.weight_bytes + command.kv_floor
        if sum(worker.taken.values()) + grant > worker.budget:
            self.up_link(agent, e.LoadFailed(command.replica, "no room", False))
            return
        worker.loading.add(command.replica)
        worker.taken[command.replica] = grant
        incarnation = worker.incarnation
        missing = 0 if command.checkpoint in agent.resident else footprint.file_bytes
        self.reads[command.checkpoint] += missing
        seconds = self.load_s + missing / self.disk_bps

        def here() -> bool:
            return worker.up and worker.incarnation == incarnation and command.replica in worker.loading

        def half() -> None:
            if here() and command.model in self.poison_models:
                self.kill(agent, worker, f"segfault in {command.model}")
            elif here():
                self.up_link(agent, e.LoadProgress(command.replica, footprint.file_bytes // 2, footprint.file_bytes))

        def whole() -> None:
            if not here() or command.model in self.stuck:
                return
            worker.loading.remove(command.replica)
            if command.model in self.broken:
                del worker.taken[command.replica]
                self.up_link(agent, e.LoadFailed(command.replica, *self.broken[command.model]))
                return
            agent.resident[command.checkpoint] = footprint.file_bytes
            worker.replicas[command.replica] = e.HeldReplica(
                command.replica, worker.device, command.model, command.checkpoint, command.dtype
            )
            phases = LoadPhases(0.0, missing / self.disk_bps, 0.0, seconds, missing, 0, footprint.file_bytes - missing)
            self.up_link(agent, e.ReplicaReady(command.replica, phases))

        self.after(seconds / 2, half)
        self.after(seconds, whole)

    def unload(self, command: c.Unload) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            for run in list(worker.runs.values()):
                if run.replica == command.replica:
                    self.stop(worker, run)
            worker.replicas.pop(command.replica, None)
            worker.taken.pop(command.replica, None)
            worker.loading.discard(command.replica)
            self.up_link(agent, e.Unloaded(command.replica))

        self.down_link(command.device, command, arrive)

    def dispatch(self, command: c.Dispatch) -> None:
        client = self.clients[command.sequence]
        for agent in self.agents.values():
            for worker in agent.workers.values():
                run = worker.runs.get(command.sequence)
                if run is not None and run.epoch == client.epoch:
                    client.log = max(client.log, self.tokens(run))
        client.epoch = command.epoch
        client.dispatches.append(command)
        if client.end:
            self.after(0.0005, lambda: self.tell(e.ClientGone(command.sequence)))
            return

        def arrive(agent: Agent, worker: Worker) -> None:
            if not worker.up:
                return
            if command.replica not in worker.replicas:
                self.up_link(agent, e.SequenceRefused(command.sequence, command.epoch, "no such replica"))
                return
            old = worker.runs.get(command.sequence)
            if old is not None and old.epoch >= command.epoch:
                return
            if old is not None:
                self.stop(worker, old)
            self._run(agent, worker, Run(command.sequence, command.epoch, command.replica, client.log, self.now))

        self.down_link(command.device, command, arrive)

    def _run(self, agent: Agent, worker: Worker, run: Run) -> None:
        worker.runs[run.sequence] = run
        client = self.clients[run.sequence]

        def first() -> None:
            if run.live:
                self.up_link(agent, e.FirstToken(run.sequence, run.epoch, self.prefill_s))

        def die() -> None:
            if run.live:
                self.kill(agent, worker, f"CUDA error in sequence {run.sequence}")

        def last() -> None:
            if not run.live:
                return
            self.stop(worker, run)
            if client.epoch == run.epoch:
                self._end(run.sequence, "done")
            self.up_link(agent, e.SequenceDone(run.sequence, run.epoch, FinishReason.LENGTH, client.tokens))

        if run.sequence in self.poison:
            self.after(self.poison[run.sequence] * self.chance.uniform(0.5, 1.5), die)
        self.after(self.prefill_s, first)
        self.after(self.prefill_s + self.token_s * max(0, client.tokens - run.base - 1), last)

    def cancel(self, command: c.Cancel) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            run = worker.runs.get(command.sequence)
            if run is not None and run.epoch <= command.epoch:
                self.stop(worker, run)
            self._report(agent, worker)

        self.down_link(command.device, command, arrive)

    def reject(self, command: c.Reject) -> None:
        self.clients[command.sequence].reject = command
        self._end(command.sequence, f"{command.status} {command.code}")

    def kill_worker(self, command: c.KillWorker) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            if worker.incarnation == command.incarnation:
                self.kill(agent, worker)

        self.down_link(command.device, command, arrive)

    def drop_node(self, command: c.DropNode) -> None:
        agent = self.agents[command.node]
        if c.DropNode not in self.mute:
            self.after(0.0, lambda: self.disconnect(agent))

    def wake_at(self, command: c.WakeAt) -> None:
        self.wake = command.at

        def ring() -> None:
            if self.wake == command.at:
                self.tell(e.Tick())

        self.at(command.at, ring)

    def note(self, command: c.Command) -> None:
        """For logs and metrics alone."""

    def forget(self, command: c.Forget) -> None:
        self.agents[command.node].resident.pop(command.checkpoint, None)


OBEY: dict[type, Callable[[World, Any], None]] = {
    c.Reserve: World.reserve,
    c.StartLoad: World.start_load,
    c.Unload: World.unload,
    c.Dispatch: World.dispatch,
    c.Cancel: World.cancel,
    c.Reject: World.reject,
    c.KillWorker: World.kill_worker,
    c.DropNode: World.drop_node,
    c.Forget: World.forget,
    c.WakeAt: World.wake_at,
    c.Decided: World.note,
    c.Outcome: World.note,
    c.Evicted: World.note,
}
