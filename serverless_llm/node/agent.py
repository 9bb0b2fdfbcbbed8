"""The node agent: owns disk and DRAM of one node, keeps a worker on each of its devices, relays frames.

`python -m serverless_llm.node.agent JSON` with an `AgentOptions` as JSON. It dials the head that the state
directory names, again and again, and outlives it by `orphan_grace`. It never imports torch.

A link to a head that ends takes all running sequences and unfinished loads with it (the head re-queues or has
died); replicas and the DRAM tier stay, and the next head decides which it keeps.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec
import uvloop

from serverless_llm import framing, wire
from serverless_llm.errors import CapacityError, ServerlessLLMError
from serverless_llm.node import logs, state
from serverless_llm.node.devices import budgets, free
from serverless_llm.node.links import CLOSE_LIMIT, MAX_MESSAGE, WebSocketLink
from serverless_llm.node.options import AgentOptions
from serverless_llm.node.slot import Slot
from serverless_llm.node.spawner import Spawner
from serverless_llm.node.store import Store
from serverless_llm.surroundings import take_descriptors

log = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds
ASLEEP = 3.0  # seconds between two heartbeats that show that this process was stopped meanwhile
RETRY = 0.1  # seconds between tries to reach a head
FIRST_GRACE = 10.0  # seconds that a young agent waits for its head, however short `orphan_grace` is
DIAL_LIMIT = 5.0  # seconds for one try
RELAYED = frozenset(wire.KIND[kind] for kind in (wire.Tokens, wire.Step, wire.Progress, wire.Reserved, wire.Refused))
CANCEL_ALL = wire.Cancel([])  # to a worker: stop every sequence


class Agent:
    """One node. `run` returns when it must end, by signal, by order of the head, or as an orphan."""

    def __init__(self, options: AgentOptions) -> None:
        self.options = options
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._link: WebSocketLink | None = None
        self._number = 0  # of this node, given by the head
        self._generation = 0  # of the head
        self._store = Store(options, self._tell, lambda device: self._slots[device])
        self._spawner = Spawner(self._boot_all, self._spawned, self._exited, self._forkserver_lost, options.node)
        self._devices = [
            wire.Device(number, device.kind, budget, device.weights)
            for number, (device, budget) in enumerate(zip(options.devices, budgets(options.devices), strict=True))
        ]
        self._slots = [self._slot(device) for device in self._devices]

    def _slot(self, device: wire.Device) -> Slot:
        options = self.options
        boot = wire.Boot(
            device=device.index,
            incarnation=0,
            kind=device.kind,
            budget=device.budget,
            weights=device.weights,
            pool_bytes=options.dram,
            threads=options.threads,
            upload_rate=options.upload_rate,
        )
        return Slot(
            boot, self._store.pool_fd, self._spawner, self._from_worker, self._up, self._lost, options.stuck_after
        )

    async def run(self) -> str:
        """Serves until the end, frees everything, and returns why it ended."""
        self._spawner.start()
        tasks = [asyncio.ensure_future(part) for part in (self._dial(), self._beat())]
        try:
            done, _ = await asyncio.wait([self._end, *tasks], return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._spawner.stop()
            self._store.close()

    def stop(self, cause: str) -> None:
        if not self._end.done():
            self._end.set_result(cause)

    # --- the head ---

    async def _dial(self) -> str:
        """Serves one head after another; returns when there was none for too long."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + max(self.options.grace, FIRST_GRACE)
        async with aiohttp.ClientSession() as session:
            while clock() < deadline:
                try:
                    async with asyncio.timeout(DIAL_LIMIT):
                        socket = await self._connect(session)
                except (aiohttp.ClientError, OSError, TimeoutError, ServerlessLLMError) as error:
                    log.debug("no head: %s", error)
                else:
                    if await self._serve(socket):
                        deadline = clock() + self.options.grace
                await asyncio.sleep(RETRY)
        return f"no head for {self.options.grace:g} s"

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        directory = Path(self.options.state_dir)
        head = state.read_head(directory)
        if head is None:
            raise ConnectionError("no head.json yet")
        access = {"Authorization": f"Bearer {state.agent_token(directory)}"}
        return await session.ws_connect(
            f"{head.agents}/agents/connect",
            headers=access,
            autoping=False,
            max_msg_size=MAX_MESSAGE,
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_LIMIT),
        )

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        """Talks to a head until the link ends. False: the head never welcomed this agent."""
        welcomed = False

        def receive(frame: framing.Frame) -> None:
            nonlocal welcomed
            welcomed = True
            self._from_head(frame)

        link = WebSocketLink(socket, receive)
        link.send(wire.encode(self._hello()))
        self._link = link
        try:
            cause = await link.run()
        finally:
            self._link = None
            self._store.cancel_loads()
            for slot in self._slots:
                slot.send(CANCEL_ALL)
        log.warning("link to the head ended: %s", cause)
        return welcomed

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            protocol=framing.PROTOCOL,
            node=self.options.node,
            pid=os.getpid(),
            dram=self.options.dram,
            devices=self._devices,
            workers=self._workers(),
            replicas=self._store.replicas(),
            shared=self._store.shared(),
            resident=self._store.resident(),
            bandwidth=self._store.bandwidth,
            limits=self.options.limits,
        )

    def _workers(self) -> list[wire.WorkerState]:
        return [
            wire.WorkerState(
                device=slot.device,
                incarnation=slot.incarnation if slot.up else 0,
                pid=slot.pid,
                step=slot.step,
                numerics_id=slot.numerics_id,
                replicas=self._store.on_device(slot.device),
                pinned=slot.pinned.bytes,
                unpinned=slot.pinned.refused,
            )
            for slot in self._slots
        ]

    async def _beat(self) -> NoReturn:
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(HEARTBEAT)
            asleep = clock() - began > ASLEEP
            logs.cut(logs.log_path(self.options))
            for slot in self._slots:
                slot.forgive() if asleep else slot.check()
            self._tell(
                wire.Heartbeat(
                    workers=self._workers(),
                    resident=self._store.resident(),
                    bandwidth=self._store.bandwidth,
                    dram_used=self._store.used,
                    link_bytes=self._store.link_bytes(),
                    digests=self._store.digests(),
                    verified=dataclasses.asdict(self._store.tally),
                    own=self._store.own_bytes(),
                    lent=self._store.lent_bytes(),
                    away=self._store.away_bytes(),
                )
            )

    def _tell(self, message: wire.Message) -> None:
        """To the controller; dropped while there is no head, which learns all from the next Hello."""
        if self._link is not None:
            self._link.send(
                wire.encode(message, framing.agent_address(self._number), framing.CONTROLLER, self._generation)
            )

    def _from_head(self, frame: framing.Frame) -> None:
        device = frame.header.destination & 0xFFFF
        if device:
            self._slots[device - 1].relay(frame.raw)
            return
        match wire.decode(frame.header.kind, frame.body):
            case wire.Welcome(node, generation, away):
                self._number, self._generation = node, generation
                self._store.look(away)
            case wire.StartLoad() as message:
                self._store.start(message)
            case wire.Hasten(replica):
                self._store.hasten(replica)
            case wire.Unload(replica):
                self._store.unload(replica)
            case wire.KillWorker(number, incarnation):
                self._kill(number, incarnation)
            case wire.Forget(checkpoint):
                self._store.forget(checkpoint)
            case wire.Shutdown():
                self.stop("the server stopped")
            case other:
                log.warning("the head sent %s, which no agent takes", type(other).__name__)

    def _kill(self, number: int, incarnation: int) -> None:
        slot = self._slots[number]
        if slot.incarnation == incarnation:
            slot.kill("killed by the head: it did not answer")

    # --- workers ---

    def _from_worker(self, slot: Slot, frame: framing.Frame) -> None:
        if frame.header.kind in RELAYED:
            if self._link is not None:
                self._link.send(frame.raw)
            return
        match wire.decode(frame.header.kind, frame.body):
            case wire.Placed() as message:
                self._store.placed(message)
            case wire.Compared() as message:
                self._store.compared(message)
            case wire.Copied(replica, nbytes):
                self._store.copied(replica, nbytes)
            case wire.Dropped(replica):
                self._store.dropped(replica)
            case wire.Failed(replica, text, permanent):
                self._store.failed(replica, text, permanent)
            case other:
                log.warning("worker %d sent %s, which no agent takes", slot.device, type(other).__name__)

    def _up(self, slot: Slot) -> None:
        if not self._devices[slot.device].budget:
            self._ask_again(slot)
            return
        self._tell(wire.WorkerUp(slot.device, slot.incarnation, slot.pid, slot.numerics_id))

    def _ask_again(self, slot: Slot) -> None:
        """A device without memory is of no use; the driver may tell of it by now."""
        try:
            free(slot.device)
        except CapacityError as error:
            slot.refuse(str(error))
            return
        if any(device.budget for device in self._devices):
            slot.refuse("its memory, unknown when this node came up, is known now: restart the node to use it")
        else:
            self.stop("the driver, which did not answer before, does now: another agent asks it for its memory")

    def _lost(self, slot: Slot, cause: str, charged: bool) -> None:
        self._store.worker_lost(slot.device)
        self._tell(wire.WorkerLost(slot.device, slot.incarnation, cause, charged))

    def _boot_all(self) -> None:
        for slot in self._slots:
            slot.boot()

    def _spawned(self, device: int, incarnation: int, pid: int) -> None:
        self._slots[device].spawned(incarnation, pid)

    def _exited(self, device: int, incarnation: int, status: int) -> None:
        self._slots[device].exited(incarnation, status)

    def _forkserver_lost(self, cause: str) -> None:
        for slot in self._slots:
            slot.forkserver_lost(cause)


async def serve(options: AgentOptions) -> None:
    agent = Agent(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop, signal.Signals(number).name)
    log.warning("%s ends: %s", options.node, await agent.run())


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        options = msgspec.json.decode(sys.argv[1], type=AgentOptions)
        state.lock(options.lock_path, f"another agent of {options.node}")
        take_descriptors()  # each shard that is read takes two
        uvloop.run(serve(options))
    except ServerlessLLMError as error:
        log.error("%s", error)  # noqa: TRY400 - a message for the operator, not a trace
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
