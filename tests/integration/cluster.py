"""A head in this process, its agents and workers as real processes, and a gateway of a few lines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from serverless_llm import wire
from serverless_llm.cluster import commands
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.errors import RequestError
from serverless_llm.node import processes, state
from serverless_llm.node.head import Head
from serverless_llm.node.options import AgentOptions, DeviceOptions
from serverless_llm.node.state import State

MIB = 1 << 20


@dataclass
class Stream:
    """One sequence as its gateway sees it."""

    prompt: list[int]
    max_tokens: int
    model: str
    log: list[int] = field(default_factory=list)
    epoch: int = 0
    attached: wire.Attach | None = None
    attaches: int = 0
    finish: str = ""
    rejected: wire.Rejected | None = None


class Gateway:
    """Keeps the token logs, sends `Run` when it is told to, and asks admin questions."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.catalog = wire.Catalog([], False)
        self.send: Callable[[wire.Message], None] = lambda _: None
        self.decisions: list[commands.Decided | commands.Outcome | commands.Evicted] = []
        self._answers: dict[int, wire.Answer] = {}
        self._changed = asyncio.Event()
        self._asked = 0

    def observe(self, decision: commands.Decided | commands.Outcome | commands.Evicted) -> None:
        self.decisions.append(decision)
        self._changed.set()

    def deliver(self, message: wire.Message) -> None:
        match message:
            case wire.Tokens(entries):
                for entry in entries:
                    self._tokens(*entry)
            case wire.Attach():
                self._attach(message)
            case wire.Rejected():
                self.streams[message.sequence].rejected = message
            case wire.Catalog():
                self.catalog = message
            case wire.Answer():
                self._answers[message.id] = message
        self._changed.set()

    def _attach(self, attach: wire.Attach) -> None:
        stream = self.streams[attach.sequence]
        assert attach.epoch > stream.epoch
        stream.epoch, stream.attached = attach.epoch, attach
        stream.attaches += 1
        prompt, generated = (np.array(part, np.int32).tobytes() for part in (stream.prompt, stream.log))
        self.send(
            wire.Run(
                attach.sequence, attach.epoch, attach.replica, prompt, generated, 0.0, 0, 1.0, 0, stream.max_tokens, []
            )
        )

    def _tokens(self, sequence: int, epoch: int, tokens: list[int], finish: str) -> None:
        stream = self.streams.get(sequence)
        if stream is not None and epoch == stream.epoch and not stream.finish:
            stream.log += tokens
            stream.finish = finish

    async def until(self, condition: Callable[[], object], what: str, seconds: float = 20) -> None:
        """Waits for something that a message brings about."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"waited {seconds} s for {what}") from None

    def start(self, model: str, prompt: list[int], max_tokens: int) -> Stream:
        sequence = 1 + max(self.streams, default=0)
        stream = self.streams[sequence] = Stream(prompt, max_tokens, model)
        checkpoint = next((info.checkpoint for info in self.catalog.models if info.name == model), "")
        self.send(wire.Arrive(sequence, model, checkpoint, "online", None, f"request-{sequence}"))
        self.send(wire.Prompted(sequence, len(prompt), max_tokens))
        return stream

    async def finished(self, stream: Stream, seconds: float = 30) -> list[int]:
        await self.until(lambda: stream.finish or stream.rejected, f"the end of {stream}", seconds)
        assert stream.rejected is None, stream.rejected
        return stream.log

    async def generate(self, model: str, prompt: list[int], max_tokens: int) -> list[int]:
        return await self.finished(self.start(model, prompt, max_tokens))

    async def ask(self, verb: str, name: str = "", **body: Any) -> Any:
        """Raises:
        RequestError: the answer is one.
        """
        self._asked += 1
        number = self._asked
        self.send(wire.Ask(number, verb, name, json.dumps(body).encode()))
        await self.until(lambda: number in self._answers, f"an answer to {verb}")
        answer = self._answers.pop(number)
        given = json.loads(answer.body)
        if answer.status != 200:
            raise RequestError(answer.status, given["error"]["code"], given["error"]["message"])
        return given

    async def devices(self) -> list[dict[str, Any]]:
        return [device | {"agent_pid": node["agent_pid"]} for node in (await self.ask("status"))["nodes"]
                for device in node["devices"]]  # fmt: skip

    async def seen(self, condition: Callable[[list[dict[str, Any]]], Any], what: str, seconds: float = 20) -> Any:
        """Asks for the devices' status until `condition` gives something true."""
        async with asyncio.timeout(seconds):
            while not (found := condition(await self.devices())):
                await asyncio.sleep(0.01)
        return found


@dataclass
class Cluster:
    """A running head with its gateway."""

    head: Head
    gateway: Gateway
    task: asyncio.Task[None]

    async def abandon(self) -> None:
        """As a killed head: its links are cut, its agents live on."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def agent(
    directory: Path, node: str = "node0", devices: int = 1, weights: str = "view", **changes: Any
) -> AgentOptions:
    fields: dict[str, Any] = {"dram": 64 * MIB, "orphan_grace": 5.0} | changes
    budget = fields.pop("budget", 16 * MIB)
    device = DeviceOptions("cpu", budget, weights)
    return AgentOptions(state_dir=str(directory), node=node, devices=(device,) * devices, **fields)


@asynccontextmanager
async def serving(directory: Path, *agents: AgentOptions, ready: bool = True) -> AsyncIterator[Cluster]:
    """A head on `directory` that keeps `agents` running. On leaving it only lets go: see `ended`."""
    kept = State(directory)
    gateway = Gateway()
    head = Head(kept, Machine(Policy()), agents, gateway.deliver, [gateway.observe])
    gateway.send = head.receive
    app = web.Application()
    app.add_routes(head.routes())
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    await head.restore({})
    host, port = runner.addresses[0][:2]
    head.listening(f"http://{host}:{port}")
    cluster = Cluster(head, gateway, asyncio.ensure_future(head.run()))
    try:
        if ready:
            await gateway.until(lambda: gateway.catalog.ready, "the cluster to be ready", 60)
        yield cluster
    finally:
        await cluster.abandon()
        await runner.cleanup()
        kept.close()


async def ended(*agents: AgentOptions) -> None:
    """Ends the agents, if they live, and waits until they are gone."""
    for options in agents:
        pid = state.holder(options.lock_path)
        if pid:
            os.kill(pid, signal.SIGTERM)
            await processes.exit_of(pid)
