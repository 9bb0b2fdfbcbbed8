"""The nodes of the driver's world: agents and workers that answer commands, and the links between them and the head."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import (
    CheckpointId,
    DeviceId,
    DeviceSpec,
    FinishReason,
    Footprint,
    LoadPhases,
    ModelName,
    NodeId,
    NodeSpec,
    ReplicaId,
    SequenceId,
)
from tests.unit.cluster.cast import GIB, Agent, Client, Faults, Run, Time, Worker


class Agents(Time):
    """All nodes, and what their workers know of the clients: how long an answer is, and what the token log has."""

    def __init__(self, faults: Faults, seed: int) -> None:
        super().__init__()
        self.faults = faults
        self.chance = random.Random(seed)
        self.agents: dict[NodeId, Agent] = {}
        self.clients: dict[SequenceId, Client] = {}
        self.footprints: dict[CheckpointId, Footprint] = {}
        self.contents: dict[CheckpointId, tuple[str, ...]] = {}  # what several checkpoints may have
        self.sizes: dict[str, int] = {}  # of these
        self.loads: list[c.StartLoad] = []
        self.reads: Counter[CheckpointId] = Counter()
        self.deaths = 0
        self.poison: dict[SequenceId, float] = {}  # seconds into each run, half as many or half as many more
        self.poison_models: set[ModelName] = set()
        self.broken: dict[ModelName, tuple[str, bool]] = {}  # loads fail: message, permanent
        self.stuck: set[ModelName] = set()  # loads never end
        self.mute: set[type] = set()  # commands that nobody answers
        self.refusing: dict[DeviceId, int] = {}  # bytes that loads lack there
        self.rtt_s, self.load_s, self.prefill_s, self.token_s = 0.001, 0.08, 0.02, 0.01
        self.disk_bps, self.restart_s, self.progress_s = 2.0 * GIB, 0.3, 0.1

    def tell(self, event: e.Event) -> None:
        """The head hears of it."""
        raise NotImplementedError

    def end(self, sequence: SequenceId, how: str) -> None:
        """Its client has all that it gets."""
        raise NotImplementedError

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

    # --- links ---

    def connect(self, agent: Agent) -> None:
        """The agent dials in, with all that it holds."""
        if agent.link or agent.cut or not agent.up:
            return
        self.serial += 1
        agent.link = self.serial
        workers = tuple((worker.device, worker.incarnation) for worker in agent.workers.values() if worker.up)
        held = tuple(one for worker in agent.workers.values() if worker.up for one in worker.replicas.values())
        self.tell(e.NodeJoined(agent.spec, workers, held, tuple(agent.resident.items())))

    def disconnect(self, agent: Agent, again_s: float = 0.2) -> None:
        """The link breaks; the head notices; the agent dials again."""
        if agent.link:
            agent.link = 0
            self.tell(e.NodeLost(agent.spec.node))
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
            self.after(self._lag(), lambda: self.tell(event) if agent.link == link else None)

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
        for held in (worker.replicas, worker.loading, worker.taken, worker.extents):
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
        shared = self._place(agent, worker, command)
        if worker.used(self.sizes) > worker.budget:
            self._drop(worker, command.replica)
            self.up_link(agent, e.LoadFailed(command.replica, "no room", False))
            return
        self._strand(agent, worker)
        worker.loading.add(command.replica)
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
                self._drop(worker, command.replica)
                self.up_link(agent, e.LoadFailed(command.replica, *self.broken[command.model]))
                return
            agent.resident[command.checkpoint] = footprint.file_bytes
            worker.replicas[command.replica] = e.HeldReplica(
                command.replica, worker.device, command.model, command.checkpoint, command.dtype
            )
            for number, size, lender in shared:
                for name in {lender, command.replica} & worker.replicas.keys():
                    one = worker.replicas[name]
                    extents = tuple(dict.fromkeys([*one.shared, (number, size)]))
                    worker.replicas[name] = replace(one, shared=extents)
            phases = LoadPhases(0.0, missing / self.disk_bps, 0.0, seconds, missing, 0, footprint.file_bytes - missing)
            self.up_link(agent, e.ReplicaReady(command.replica, phases, shared))

        self.after(seconds / 2, half)
        self.after(seconds, whole)

    def _strand(self, agent: Agent, worker: Worker) -> None:
        """Weights came: what does not fit beside them is given back."""
        for run in list(worker.runs.values()):
            if self.clients[run.sequence].kv > worker.budget - worker.used(self.sizes):
                self.stop(worker, run)
                self.up_link(agent, e.SequenceRefused(run.sequence, run.epoch, "weights came", 1 << 20, begun=True))

    def _place(self, agent: Agent, worker: Worker, command: c.StartLoad) -> tuple[tuple[int, int, ReplicaId], ...]:
        """Its weights, but for what a replica that serves has there already; that, as in `ReplicaReady`."""
        copies = agent.spec.devices[worker.device.number].weights == "copy"
        contents = self.contents.get(command.checkpoint, ()) if copies else ()
        found = {content: place for content in contents if (place := worker.find(content))}
        held = worker.extents[command.replica] = {}
        for content in contents:
            worker.made += content not in found
            held[content] = found[content][0] if content in found else worker.made
        own = self.footprints[command.checkpoint].weight_bytes - sum(self.sizes[content] for content in contents)
        worker.taken[command.replica] = own + command.kv_floor
        return tuple((number, self.sizes[content], lender) for content, (number, lender) in found.items())

    def _drop(self, worker: Worker, replica: ReplicaId) -> None:
        worker.taken.pop(replica, None)
        worker.extents.pop(replica, None)

    def unload(self, command: c.Unload) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            for run in list(worker.runs.values()):
                if run.replica == command.replica:
                    self.stop(worker, run)
            worker.replicas.pop(command.replica, None)
            self._drop(worker, command.replica)
            worker.loading.discard(command.replica)
            self.up_link(agent, e.Unloaded(command.replica))

        self.down_link(command.device, command, arrive)

    def deliver(self, command: c.Dispatch) -> None:
        """To the worker, with the tokens that the log has when it arrives."""
        client = self.clients[command.sequence]

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
            missing = client.kv - (worker.budget - worker.used(self.sizes))
            if missing > 0:
                never = client.kv > worker.budget - worker.alone(command.replica, self.sizes)
                refusal = e.SequenceRefused(command.sequence, command.epoch, "no room", missing, never)
                self.up_link(agent, refusal)
                return
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
                self.end(run.sequence, "done")
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

    def kill_worker(self, command: c.KillWorker) -> None:
        def arrive(agent: Agent, worker: Worker) -> None:
            if worker.incarnation == command.incarnation:
                self.kill(agent, worker)

        self.down_link(command.device, command, arrive)

    def drop_node(self, command: c.DropNode) -> None:
        agent = self.agents[command.node]
        if c.DropNode not in self.mute:
            self.after(0.0, lambda: self.disconnect(agent))

    def forget(self, command: c.Forget) -> None:
        self.agents[command.node].resident.pop(command.checkpoint, None)
