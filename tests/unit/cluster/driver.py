"""A cluster in virtual time around the real machine: agents, workers and a gateway that answer its commands.

Links between the head and its agents may drop, delay, double and reorder frames; the gateway's link does not, because
it lives in the head's process. After every event the machine's invariants and the world's own are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.invariants import check_invariants
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import CheckpointId, Footprint, ModelName, ModelSpec, NodeId, SequenceId
from tests.unit.cluster.agents import Agents
from tests.unit.cluster.cast import Client, Faults

CALM = Faults()
BLOCK = 1 << 16


class World(Agents):
    """Everything outside the machine. `now` only moves in `run`."""

    def __init__(self, policy: Policy | None = None, faults: Faults = CALM, seed: int = 0) -> None:
        super().__init__(faults, seed)
        self.machine = Machine(policy or Policy())
        self.generation = 0
        self.shown: dict[ModelName, CheckpointId] = {}  # what the gateway knows to be deployed
        self.log: list[str] = []
        self.said: list[c.Command] = []
        self.events = 0
        self.wake = 0.0
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

    def deploy(  # type: ignore[no-untyped-def]
        self,
        name: ModelName,
        size: int = 700 << 20,
        checkpoint: str = "",
        context: int = 4096,
        contents: tuple[str, ...] = (),
        **spec,
    ) -> None:
        """`contents`: as of `Agents`, of its checkpoint."""
        footprint = Footprint(checkpoint or f"sha-{name}", size, size, BLOCK, context)
        self.footprints[footprint.checkpoint] = footprint
        self.contents[footprint.checkpoint] = contents
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
        kv: int = 0,
    ) -> SequenceId:
        """A client asks now. `then` is called when it has its answer. `tokenise_s` None: its prompt never is. `kv`: as
        of `Client`."""
        sequence = len(self.clients) + 1
        checkpoint = self.shown.get(model, "")
        self.clients[sequence] = Client(model, checkpoint, prompt, tokens, self.now, then, kv)
        self.handle(e.RequestArrived(sequence, model, checkpoint, keep_alive=keep_alive))
        if tokenise_s is not None:
            self.after(tokenise_s, lambda: self.tell(e.PromptReady(sequence, prompt, tokens)))
        return sequence

    def hang_up(self, sequence: SequenceId) -> None:
        self.end(sequence, "gone")
        self.handle(e.ClientGone(sequence))

    def end(self, sequence: SequenceId, how: str) -> None:
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
            self.end(sequence, "gone")
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

    # --- commands ---

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
        self.deliver(command)

    def reject(self, command: c.Reject) -> None:
        self.clients[command.sequence].reject = command
        self.end(command.sequence, f"{command.status} {command.code}")

    def wake_at(self, command: c.WakeAt) -> None:
        self.wake = command.at

        def ring() -> None:
            if self.wake == command.at:
                self.tell(e.Tick())

        self.at(command.at, ring)

    def note(self, command: c.Command) -> None:
        """For logs and metrics alone."""


OBEY: dict[type, Callable[[World, Any], None]] = {
    c.Reserve: World.reserve,
    c.StartLoad: World.start_load,
    c.Hasten: World.note,
    c.Unload: World.unload,
    c.Dispatch: World.dispatch,
    c.GivenBack: World.note,
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
