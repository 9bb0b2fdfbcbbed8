"""The controller between a gateway that is a list and agents that are bare WebSockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
import pytest
import yarl
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestServer

from serverless_llm import framing, wire
from serverless_llm.cluster import commands, events
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.domain import DeviceId, Footprint, ModelSpec
from serverless_llm.node import controller as module
from serverless_llm.node.controller import Controller
from serverless_llm.node.registry import Registry
from serverless_llm.node.state import State

M = TypeVar("M", bound=wire.Message)
MIB = 1 << 20
GENERATION = 3


class Agent:
    """One agent's link, by hand."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.heard: list[tuple[framing.Header, wire.Message]] = []
        self._splitter = framing.Splitter()

    async def send(self, message: wire.Message, destination: int = 0, epoch: int = GENERATION) -> None:
        await self.socket.send_bytes(wire.encode(message, 0, destination, epoch))

    async def answer(self, kind: type[M]) -> tuple[framing.Header, M]:
        """The next message of a kind; those before it are in `heard`."""
        while True:
            for header, message in self.heard:
                if isinstance(message, kind):
                    self.heard.remove((header, message))
                    return header, message
            async with asyncio.timeout(10):
                raw = await self.socket.receive_bytes()
            for frame in self._splitter.feed(raw):
                self.heard.append((frame.header, wire.decode(frame.header.kind, frame.body)))

    async def closed(self) -> None:
        async with asyncio.timeout(10):
            while not self.socket.closed:
                await self.socket.receive()


class Office:
    """A controller behind a server, and what it delivered."""

    def __init__(self, server: BaseTestServer, session: aiohttp.ClientSession, controller: Controller) -> None:
        self.controller = controller
        self.delivered: list[wire.Message] = []
        self._server = server
        self._session = session
        self._changed = asyncio.Event()

    def deliver(self, message: wire.Message) -> None:
        self.delivered.append(message)
        self._changed.set()

    @property
    def url(self) -> yarl.URL:
        return self._server.make_url("/")

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def dial(self, token: str = "secret") -> Agent:
        access = {"Authorization": f"Bearer {token}"}
        return Agent(await self._session.ws_connect(self._server.make_url("/agents/connect"), headers=access))

    async def joined(self, node: str = "n") -> Agent:
        agent = await self.dial()
        await agent.send(hello(node))
        await agent.answer(wire.Welcome)
        return agent


def hello(node: str = "n", protocol: int = framing.PROTOCOL) -> wire.Hello:
    worker = wire.WorkerState(0, 1, 99, 0, "id", [])
    return wire.Hello(protocol, node, 4, 64 * MIB, [wire.Device(0, "cpu", 16 * MIB, "view")], [worker], [], [], {})


@asynccontextmanager
async def office() -> AsyncIterator[Office]:
    delivered: list[Callable[[wire.Message], None]] = []
    controller = Controller(Machine(Policy()), GENERATION, "secret", lambda message: delivered[0](message))
    app = web.Application()
    app.router.add_get("/agents/connect", controller.agent_handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        one = Office(server, session, controller)
        delivered.append(one.deliver)
        yield one


def deploy(controller: Controller) -> None:
    controller.handle(events.Deploy(ModelSpec("m", "/m"), Footprint("c", MIB, MIB, 1024, 64)))


async def dispatched(one: Office, agent: Agent) -> wire.Attach:
    """A cold start by hand, up to the gateway's Attach."""
    deploy(one.controller)
    one.controller.receive(wire.Arrive(7, "m", "c", "online", None, "id"))
    one.controller.receive(wire.Prompted(7, 3, 8))
    header, reserve = await agent.answer(wire.Reserve)
    assert header.destination == framing.worker_address(0, 0)
    await agent.send(wire.Reserved(0, reserve.replica))
    header, order = await agent.answer(wire.StartLoad)
    assert header.destination == framing.agent_address(0)
    assert (order.model, order.source, order.checkpoint) == ("m", "/m", "c")
    await agent.send(wire.ReplicaReady(order.replica, 0.0, 0.1, 0.0, 0.1, MIB, 0, 0))
    await one.until(lambda: any(isinstance(message, wire.Attach) for message in one.delivered))
    (attach,) = [message for message in one.delivered if isinstance(message, wire.Attach)]
    assert (attach.sequence, attach.destination, attach.device) == (7, framing.worker_address(0, 0), "n/0")
    assert attach.cold["load_disk_ms"] == pytest.approx(100)
    return attach


def run_of(attach: wire.Attach, epoch: int | None = None) -> wire.Run:
    number = attach.epoch if epoch is None else epoch
    return wire.Run(attach.sequence, number, attach.replica, b"", b"", 0.0, 0, 1.0, 0, 8, [])


def test_a_node_that_is_dropped_while_its_link_ends_is_drained_by_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with office() as one:
            await one.joined()
            kept = State(tmp_path)
            desk = Registry(one.controller, kept, one.deliver, 300.0)
            one.controller.handle(events.NodeLost("n"))  # as when it was silent for too long
            assert "n" in one.controller.peers
            await desk.ask(wire.Ask(1, "drain", "n", b"{}"))
            (answer,) = [message for message in one.delivered if isinstance(message, wire.Answer)]
            assert answer.status == 404
            kept.close()

    asyncio.run(story())


def test_a_request_from_arrival_to_its_last_token() -> None:
    async def story() -> None:
        async with office() as one:
            agent = await one.joined()
            attach = await dispatched(one, agent)
            one.controller.receive(run_of(attach, epoch=attach.epoch + 1))  # not its owner: goes nowhere
            one.controller.receive(run_of(attach))
            header, run = await agent.answer(wire.Run)
            assert run == run_of(attach)
            assert (header.source, header.destination, header.epoch) == (
                framing.GATEWAY, framing.worker_address(0, 0), GENERATION)  # fmt: skip
            late = wire.Tokens([(7, attach.epoch, [1], "")])
            tokens = wire.Tokens([(7, attach.epoch, [2], "stop")])
            await agent.send(late, framing.GATEWAY, epoch=GENERATION - 1)
            await agent.send(tokens, framing.GATEWAY)
            await agent.send(wire.Step(0, 1, [(7, attach.epoch, 0.1)], [(7, attach.epoch, "stop", 1)], []))
            await one.until(lambda: tokens in one.delivered)
            assert late not in one.delivered
            await agent.send(wire.Progress(0, 1, [(7, 1, 1, 1)], 5, 6, {"m": 2}))
            await agent.answer(wire.Cancel)  # it is done: the worker must not hold it
            assert one.controller.peers["n"].kv == {0: (5, 6)}
            assert one.controller.peers["n"].preemptions == {0: {"m": 2}}
            assert 7 not in one.controller.machine.state.sequences

    asyncio.run(story())


def test_a_client_that_leaves_is_cancelled_at_its_worker() -> None:
    async def story() -> None:
        async with office() as one:
            agent = await one.joined()
            attach = await dispatched(one, agent)
            one.controller.receive(wire.Gone([7], "client"))
            header, cancel = await agent.answer(wire.Cancel)
            assert cancel.sequences == [(7, attach.epoch)]
            assert header.destination == framing.worker_address(0, 0)

    asyncio.run(story())


def test_an_agent_is_told_which_checkpoints_only_servers_had() -> None:
    async def story() -> None:
        async with office() as one:
            for name, away in (("here", 0), ("there", 8)):
                footprint = Footprint(f"sha-{name}", 8, 8, 8, 512, remote_bytes=away)
                one.controller.handle(events.Deploy(ModelSpec(name, f"/{name}"), footprint))
            agent = await one.dial()
            await agent.send(hello())
            _, welcome = await agent.answer(wire.Welcome)
            assert welcome.away == {"sha-there": "/there"}

    asyncio.run(story())


def test_only_heartbeats_that_move_checkpoints_change_the_catalog() -> None:
    async def story() -> None:
        async with office() as one:
            await one.joined()
            changes: list[bool] = []
            one.controller.changed = changes.append
            for resident in ((), (("c", 1),), (("c", 1),), (("c", 2),), ()):
                one.controller.handle(events.Heartbeat("n", ((DeviceId("n", 0), 1, ()),), resident, ()))
            one.controller.handle(events.Heartbeat("nobody", (), (("c", 1),), ()))
            assert changes == [False, False, False]
            for away in ((("c", 1),), (("c", 1),), (("c", 0),)):
                one.controller.handle(events.Heartbeat("n", ((DeviceId("n", 0), 1, ()),), (), (), away=away))
            assert changes == [False] * 5

    asyncio.run(story())


def test_a_request_for_nothing_is_rejected() -> None:
    async def story() -> None:
        async with office() as one:
            one.controller.receive(wire.Arrive(1, "nobody", "c", "online", None, "id"))
            await one.until(lambda: one.delivered)
            (rejected,) = one.delivered
            assert isinstance(rejected, wire.Rejected)
            assert (rejected.sequence, rejected.status) == (1, 404)

    asyncio.run(story())


def test_a_lost_link_is_a_lost_node_and_numbers_stay() -> None:
    async def story() -> None:
        async with office() as one:
            first = await one.joined("a")
            second = await one.joined("b")
            assert [one.controller.peers[name].number for name in "ab"] == [0, 1]
            await first.socket.close()
            while "a" in one.controller.peers:
                await asyncio.sleep(0)
            assert list(one.controller.machine.state.nodes) == ["b"]
            third = await one.joined("a")
            assert one.controller.peers["a"].number == 0
            assert not (second.socket.closed or third.socket.closed)

    asyncio.run(story())


def test_an_agent_that_dials_anew_replaces_itself() -> None:
    async def story() -> None:
        async with office() as one:
            first = await one.joined()
            second = await one.joined()
            await first.closed()
            one.controller.shut_down()
            await second.answer(wire.Shutdown)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (wire.Beat(1, False, 0.0), "Beat instead of Hello"),
        (hello(protocol=99), f"n speaks protocol version 99, this is {framing.PROTOCOL}"),
    ],
)
def test_a_bad_first_word_ends_the_link(word: wire.Message, why: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with office() as one:
            agent = await one.dial()
            await agent.send(word)
            await agent.closed()
            assert one.controller.peers == {}

    asyncio.run(story())
    assert f"link to an agent ended: {why}" in caplog.text


def test_a_silent_visitor_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELLO_LIMIT", 0.01)

    async def story() -> None:
        async with office() as one:
            await (await one.dial()).closed()

    asyncio.run(story())


def test_the_token_is_asked_for() -> None:
    async def story() -> None:
        async with office() as one:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await one.dial("guess")
            assert refused.value.status == 401
            reader, writer = await asyncio.open_connection(one.url.host, one.url.port)
            writer.write(b"GET /agents/connect HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe9\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")  # no text is no token
            writer.close()

    asyncio.run(story())


def test_a_silent_node_is_dropped_by_the_machines_word() -> None:
    async def story() -> None:
        async with office() as one:
            agent = await one.joined()
            one.controller.perform(commands.DropNode("n"))
            one.controller.perform(commands.DropNode("unknown"))
            await agent.closed()

    asyncio.run(story())


def test_a_tick_comes_when_the_machine_wants_it() -> None:
    async def story() -> None:
        async with office() as one:
            now = one.controller.now()
            ticks: list[events.Event] = []
            one.controller.changed = lambda prompt: ticks.append(events.Tick())
            one.controller.perform(commands.WakeAt(now + 60))
            one.controller.perform(commands.WakeAt(now))
            while not ticks:
                await asyncio.sleep(0)

    asyncio.run(story())
