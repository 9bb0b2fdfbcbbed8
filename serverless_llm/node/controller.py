"""The asyncio shell around `cluster.machine.Machine`: messages in as events, commands out as messages.

Everything runs on the head's loop. Gateways speak through `receive` and `deliver`, agents dial `GET /agents/connect`.
A node's link is its life: when it ends the machine hears `NodeLost`, and the agent's next `Hello` is a new node.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from serverless_llm import framing, wire
from serverless_llm.cluster import commands, events
from serverless_llm.cluster.machine import Machine
from serverless_llm.domain import DeviceId, NodeId
from serverless_llm.errors import ProtocolError
from serverless_llm.node import news, translate
from serverless_llm.node.links import CLOSE_LIMIT, MAX_MESSAGE, WebSocketLink
from serverless_llm.node.peers import Peer
from serverless_llm.node.starts import StartLog

log = logging.getLogger(__name__)

HELLO_LIMIT = 5.0  # seconds for an agent's first frame
TOKEN_BYTES = 4  # int32, as wire.Run packs them
TOKENS = wire.KIND[wire.Tokens]
PROMPT = (events.Deploy, events.Delete, events.Pin, events.ReplicaReady, events.LoadFailed, events.NodeJoined,
          events.NodeLost, events.WorkerUp, events.WorkerLost, events.Unloaded)  # fmt: skip
SILENT = (events.Heartbeat, events.Progress, events.FirstToken, events.Resumed)

Observer = Callable[[commands.Decided | commands.Outcome | commands.Evicted], None]


class Controller:
    """Drives one machine.

    Args:
        deliver: takes messages for the gateway of this process.
        observe: called with every decision and its outcome, for metrics.
    """

    def __init__(
        self,
        machine: Machine,
        generation: int,
        token: str,
        deliver: Callable[[wire.Message], None],
        observe: Sequence[Observer] = (),
    ) -> None:
        self.machine = machine
        self.generation = generation
        self.peers: dict[NodeId, Peer] = {}
        self.starts = StartLog()
        self.changed: Callable[[bool], None] = lambda prompt: None
        self._token = token
        self._deliver = deliver
        self._observe = observe
        self._numbers: dict[NodeId, int] = {}
        self._wake: asyncio.TimerHandle | None = None

    def handle(self, event: events.Event) -> None:
        """Tells the machine, and does what it wants."""
        silent = isinstance(event, SILENT) and not self._moves_checkpoints(event)
        if isinstance(event, events.FirstToken):
            self._first_token(event)
        self.tell(news.of_event(event, self.machine.state))
        for command in self.machine.handle(event, self.now()):
            self.perform(command)
            self.tell(news.of_command(command))
        if not silent:
            self.changed(isinstance(event, PROMPT))

    def _first_token(self, event: events.FirstToken) -> None:
        sequence = self.machine.state.sequences.get(event.sequence)
        if sequence is not None and sequence.epoch == event.epoch:
            self.starts.first_token(sequence, event.prefill_s)

    def _moves_checkpoints(self, event: events.Event) -> bool:
        """A heartbeat after which a checkpoint may be in another tier."""
        if not isinstance(event, events.Heartbeat):
            return False
        node = self.machine.state.nodes.get(event.node)
        return node is not None and (node.resident, node.away) != (dict(event.resident), dict(event.away))

    def tell(self, event: news.JSON | None) -> None:
        """Tells those who watch, if there is news."""
        if event is not None:
            told = {"time": round(time.time(), 3)} | event
            asyncio.get_running_loop().call_soon(self._deliver, wire.News(msgspec.json.encode(told)))

    def now(self) -> float:
        """The machine's time."""
        return asyncio.get_running_loop().time()

    # --- gateways ---

    def receive(self, message: wire.Message) -> None:
        """A message of a gateway, `Ask` aside."""
        if isinstance(message, wire.Run):
            self._run(message)
            return
        for event in translate.from_gateway(message):
            self.handle(event)

    def _run(self, message: wire.Run) -> None:
        sequence = self.machine.state.sequences.get(message.sequence)
        if sequence is None or sequence.replica is None or sequence.epoch != message.epoch:
            return  # its owner was taken away meanwhile; another Attach is on its way
        device = sequence.replica.device
        self._send(device.node, device.number, message, framing.GATEWAY)
        if message.generated:
            self.handle(events.Resumed(message.sequence, message.epoch, len(message.generated) // TOKEN_BYTES))

    # --- agents ---

    async def agent_handler(self, request: web.Request) -> web.StreamResponse:
        """`GET /agents/connect`: one agent, for as long as its link lives."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._token.encode()):
            raise web.HTTPUnauthorized(text="agents join with the token of the state directory")
        socket = web.WebSocketResponse(autoping=False, max_msg_size=MAX_MESSAGE, timeout=CLOSE_LIMIT, compress=False)
        await socket.prepare(request)
        joining = Joining(self, socket)
        try:
            cause = await joining.link.run()
            log.warning("link to %s ended: %s", joining.node or "an agent", cause)
        finally:
            joining.leave()
        return socket

    def join(self, hello: wire.Hello, link: WebSocketLink) -> Peer:
        """Takes an agent in; one that is still connected under the same name has a dead link.

        Raises:
            ProtocolError: it speaks another version.
        """
        if hello.protocol != framing.PROTOCOL:
            raise ProtocolError(f"{hello.node} speaks protocol version {hello.protocol}, this is {framing.PROTOCOL}")
        if hello.node in self.peers:
            self.leave(self.peers[hello.node], "its agent dialled in anew")
        number = self._numbers.setdefault(hello.node, len(self._numbers))
        peer = Peer(number, link, hello)
        self.peers[hello.node] = peer
        models = self.machine.state.models.values()
        away = {one.footprint.checkpoint: one.spec.source for one in models if one.footprint.remote_bytes}
        welcome = wire.Welcome(number, self.generation, away)
        link.send(wire.encode(welcome, framing.CONTROLLER, framing.agent_address(number), self.generation))
        counts = len(hello.devices), len(hello.replicas)
        log.info("%s joined: pid %d, %d devices, %d replicas", hello.node, hello.pid, *counts)
        self.handle(translate.joined(hello))
        return peer

    def leave(self, peer: Peer, cause: str) -> None:
        """The agent's link is dead. Idempotent."""
        node = peer.hello.node
        if self.peers.get(node) is not peer:
            return
        del self.peers[node]
        peer.link.close(cause)
        self.handle(events.NodeLost(node))

    def hear(self, peer: Peer, frame: framing.Frame) -> None:
        """A frame of an agent or of one of its workers."""
        if frame.header.kind == TOKENS:
            if frame.header.epoch == self.generation:
                self._deliver(wire.decode(TOKENS, frame.body))
            return
        message = wire.decode(frame.header.kind, frame.body)
        peer.hear(message)
        if isinstance(message, wire.WorkerLost):
            log.warning("%s/%d lost its worker: %s", peer.hello.node, message.device, message.cause)
        for event in translate.from_node(peer.hello.node, message):
            self.handle(event)

    def shut_down(self) -> None:
        """Has every agent free everything and exit."""
        for node in list(self.peers):
            self._send(node, -1, wire.Shutdown())

    # --- commands ---

    def perform(self, command: commands.Command) -> None:
        """Does one thing that the machine wants."""
        match command:
            case commands.WakeAt(at):
                self._wake_at(at)
            case commands.DropNode(node):
                if node in self.peers:
                    self.peers[node].link.close("its agent was silent")
            case commands.Decided() | commands.Outcome() | commands.Evicted():
                self._note(command)
            case commands.GivenBack():
                log.info("%s", translate.described(command))
                self._to_gateway(command)
            case commands.Dispatch() | commands.Reject():
                self._to_gateway(command)
            case _:
                order = translate.to_node(command)
                assert order is not None
                self._send(*order)

    def _wake_at(self, at: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = asyncio.get_running_loop().call_at(at, self.handle, events.Tick())

    def _note(self, command: commands.Decided | commands.Outcome | commands.Evicted) -> None:
        log.info("%s", translate.described(command))
        if isinstance(command, commands.Outcome):
            self.starts.ready(command, self.now())
        for observer in self._observe:
            observer(command)

    def _to_gateway(self, command: commands.Dispatch | commands.GivenBack | commands.Reject) -> None:
        destination = self._address(command.device) if isinstance(command, commands.Dispatch) else 0
        message = translate.to_gateway(command, destination)
        assert message is not None
        # Soon, not now: a gateway may answer at once, and the machine is in the middle of its commands.
        asyncio.get_running_loop().call_soon(self._deliver, message)

    def _address(self, device: DeviceId) -> int:
        return framing.worker_address(self._numbers[device.node], device.number)

    def _send(self, node: NodeId, device: int, message: wire.Message, source: int = framing.CONTROLLER) -> None:
        """To the agent (device -1) or a worker of a node; dropped when its link is gone (`NodeLost` tells)."""
        peer = self.peers.get(node)
        if peer is None:
            return
        number = peer.number
        destination = framing.agent_address(number) if device < 0 else framing.worker_address(number, device)
        peer.link.send(wire.encode(message, source, destination, self.generation))


class Joining:
    """One agent's connection, from before its Hello on."""

    def __init__(self, controller: Controller, socket: web.WebSocketResponse) -> None:
        self._controller = controller
        self._peer: Peer | None = None
        self.link = WebSocketLink(socket, self._receive)
        self._limit = asyncio.get_running_loop().call_later(HELLO_LIMIT, self._too_late)

    @property
    def node(self) -> NodeId:
        return self._peer.hello.node if self._peer else ""

    def leave(self) -> None:
        self._limit.cancel()
        if self._peer is not None:
            self._controller.leave(self._peer, "the link ended")

    def _receive(self, frame: framing.Frame) -> None:
        if self._peer is not None:
            self._controller.hear(self._peer, frame)
            return
        hello = wire.decode(frame.header.kind, frame.body)
        if not isinstance(hello, wire.Hello):
            raise ProtocolError(f"{type(hello).__name__} instead of Hello")
        self._peer = self._controller.join(hello, self.link)

    def _too_late(self) -> None:
        if self._peer is None:
            self.link.close("no Hello")
