"""The head process: gateway, controller and agents of this machine, put together; and how it ends.

The first signal drains: new requests are refused, running streams get `drain` seconds, then an error in the stream;
agents free everything and exit. A second signal ends all of it at once; only a second `stop` waits with the first.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from serverless_llm import wire
from serverless_llm.cli.stop import STOP
from serverless_llm.cluster import commands
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.state import State
from serverless_llm.config import Config, ModelEntry
from serverless_llm.demo import tasks
from serverless_llm.domain import DeviceId
from serverless_llm.errors import ConfigurationError, RequestError
from serverless_llm.gateway import keys
from serverless_llm.gateway.app import Gateway
from serverless_llm.gateway.keys import Key
from serverless_llm.gateway.listen import Runner, listen, load_certificate, tls_context
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.text import TextPool
from serverless_llm.node import catalog, state
from serverless_llm.node.head import Head
from serverless_llm.node.options import local_agents
from serverless_llm.node.peers import Peer
from serverless_llm.surroundings import LOOPBACK

log = logging.getLogger(__name__)

ABORT_SECONDS = 1.0  # for in-stream errors to reach their clients
FULL_PASS = 100  # passes of the middle generation between two full ones, ten times as many as by default
SPARE_LINKS = 16  # of agents that dial in anew, while their old link ends; arbitrary
SAMPLE_SECONDS = 1.0  # between two looks at what agents reported


class Server:
    """One server on one state directory.

    Args:
        where: each option was given, for messages.

    Raises:
        ConfigurationError: the state directory is in use or newer, the address is taken, a model is refused.
    """

    def __init__(self, config: Config, where: Mapping[str, str]) -> None:
        self._config = config
        self._where = where
        self._tls = certificate_of(config, where)
        self._state = state.State(config.state_dir)
        self._text = TextPool()
        self._options = gateway_options(config, where["keys_file"])
        self._gateway = Gateway(self._to_head, self._text, self._state.generation, self._options)
        self._head = Head(
            self._state,
            Machine(Policy(abandon_after=config.abandon_after)),
            local_agents(config),
            self._gateway.receive,
            [self._observe],
            config.keep_alive,
            model_roots(config),
            self._check,
        )
        self._signal: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, announce: Callable[[str], None]) -> int:
        """Serves until a signal; the exit status. `announce` is told the URL once requests are accepted."""
        self._listen_for_signals()
        runner, dialled = Runner(self._gateway.application(), self._options), self._dialled()
        self._starting = asyncio.create_task(self._text.start())
        background: list[asyncio.Task[None]] = []
        try:
            await self._deploy()  # before agents of a former head can dial in: what they hold must have a name
            url = await self._open(runner, dialled)
            background = [asyncio.create_task(part) for part in (self._head.run(), self._sample())]
            await self._starting
            spare_streams()
            announce(url)
            await self._signalled_or(background)
            await self._drain()
        finally:
            for task in (self._starting, *background):
                task.cancel()
            await asyncio.gather(self._starting, *background, return_exceptions=True)
            await self._head.shut_down()
            await asyncio.gather(runner.cleanup(), dialled.cleanup())
            await self._text.close()
            (self._config.state_dir / "head.json").unlink(missing_ok=True)
            self._state.close()
        return status_of(await self._signal)

    def _to_head(self, message: wire.Message) -> None:
        self._head.receive(message)

    async def _check(self, name: str, source: str, checkpoint: str) -> bool:
        await asyncio.shield(self._starting)
        return await self._text.check(name, source, checkpoint)

    async def _signalled_or(self, background: Sequence[asyncio.Future[None]]) -> None:
        """Waits for a signal; raises what ended a background task, which should have gone on for ever."""
        waiting: list[asyncio.Future[Any]] = [self._signal, *background]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            future.result()

    def _dialled(self) -> Runner:
        """What agents dial: apart from the clients, who may take every connection that they can get."""
        app = web.Application()
        app.add_routes(self._head.routes())
        return Runner(app, replace(self._options, connections=self._config.nodes + SPARE_LINKS))

    async def _open(self, runner: web.AppRunner, dialled: web.AppRunner) -> str:
        """Listens, and tells the agents and the command line where.

        They are on this machine, and need not know whose certificate it is: they have plain ports on loopback.
        """
        config, options = self._config, self._options
        await asyncio.gather(runner.setup(), dialled.setup())
        try:
            port = await listen(runner, config.host, config.port, options, self._tls)
        except ConfigurationError as error:
            taken = getattr(error.__cause__, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
            raise ConfigurationError(f"{self._where['port' if taken else 'host']}: {error}") from error
        scheme = "https" if self._tls else "http"
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        url = f"{scheme}://{f'[{local}]' if ':' in local else local}:{port}"
        own = f"http://127.0.0.1:{await listen(runner, '127.0.0.1', 0, options)}" if self._tls else url
        self._head.listening(f"http://127.0.0.1:{await listen(dialled, '127.0.0.1', 0, options)}", own, url)
        return url

    async def _deploy(self) -> None:
        wanted = {name: deploy_body(entry) for name, entry in self._config.models.items()}
        try:
            await self._head.restore(wanted)
        except RequestError as error:
            raise ConfigurationError(f"{self._where['models']}: {error.message}") from error

    async def _sample(self) -> None:
        """Metrics that agents and workers report and no event carries."""
        while True:
            controller = self._head.controller
            state, peers = controller.machine.state, controller.peers
            for name in peers.keys() & state.nodes.keys():
                for link, total in peers[name].link_bytes.items():
                    self._gateway.metrics.bytes_moved(name, link, total)
                self._gateway.metrics.verified(name, peers[name].verified)
                for number, counts in peers[name].preemptions.items():
                    self._gateway.metrics.preempted(str(DeviceId(name, number)), counts)
            self._gateway.metrics.kv_usage(kv_usage(state, {name: peer.kv for name, peer in peers.items()}))
            for series, amounts in memory(state, peers).items():
                self._gateway.metrics.memory(series, amounts)
            await asyncio.sleep(SAMPLE_SECONDS)

    def _observe(self, note: commands.Decided | commands.Outcome | commands.Evicted) -> None:
        if isinstance(note, commands.Outcome) and note.model not in self._head.controller.machine.state.models:
            return  # deleted during its load: its series are gone
        observe(self._gateway.metrics, note)

    # --- the end ---

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, STOP):
            loop.add_signal_handler(number, self._signalled, number)
        if not sys.stderr.isatty():
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the terminal is gone
            loop.add_signal_handler(signal.SIGHUP, self._signalled, signal.SIGHUP)

    def _reload(self) -> None:
        """Reads keys and certificate anew; what cannot be read leaves the old ones in force."""
        config = self._config
        try:
            found = read_keys(config, self._where["keys_file"])
            if self._tls and config.tls_cert and config.tls_key:
                where = (self._where["tls_cert"], self._where["tls_key"])
                load_certificate(self._tls, config.tls_cert, config.tls_key, where)
            self._gateway.set_keys(found)
        except ConfigurationError as error:
            log.error("not read anew: %s", error)  # noqa: TRY400 - a message for the operator, not a trace
        else:
            log.warning("keys and certificate were read anew")

    def _signalled(self, number: int) -> None:
        if not self._signal.done():
            log.info("stopping: %s", "asked by `stop`" if number == STOP else signal.Signals(number).name)
            self._signal.set_result(number)
        elif number != STOP:  # another `stop` waits with the first
            self._head.kill_agents()
            os._exit(status_of(self._signal.result()))

    async def _drain(self) -> None:
        self._gateway.drain()
        requests = len({id(choice.live) for choice in self._gateway.live})
        if requests and sys.stderr.isatty():
            # by its thread: a terminal that takes nothing holds up no end
            log.warning("%s", draining(requests, self._config.drain))
        try:
            await asyncio.wait_for(self._gateway.idle(), self._config.drain)
        except TimeoutError:
            self._gateway.abort("the server is stopping")
            await asyncio.wait([asyncio.create_task(self._gateway.idle())], timeout=ABORT_SECONDS)


def spare_streams() -> None:
    """Full passes of the garbage collector hold up every stream, the longer the more of them there are: from now on
    they are rare, and leave out what is there now. Requests leave nothing to collect; what connections leave may wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_PASS)


def draining(requests: int, seconds: float) -> str:
    many = "1 request is" if requests == 1 else f"{requests} requests are"
    them = "it" if requests == 1 else "them"
    return f"draining: {many} running, for at most {seconds:g} s; Ctrl-C again ends {them} at once"


def status_of(number: int) -> int:
    """The exit status after a signal."""
    return 0 if number == STOP else 128 + number


def model_roots(config: Config) -> tuple[Path, ...]:
    """Where a deploy may read; the checkpoints that come with the wheel are always among it. Empty: anywhere."""
    bundled = tuple(tasks.checkpoint_dir(name).resolve() for name in tasks.NAMES)
    return config.model_roots and (*config.model_roots, *bundled)


def certificate_of(config: Config, where: Mapping[str, str]) -> ssl.SSLContext | None:
    """Raises ConfigurationError, which names the place of what is unusable."""
    if not (config.tls_cert and config.tls_key):
        return None
    return tls_context(config.tls_cert, config.tls_key, (where["tls_cert"], where["tls_key"]))


def gateway_options(config: Config, where: str = "keys_file") -> GatewayOptions:
    """The gateway's part of the configuration. Off loopback a key is made where none is given.

    Args:
        where: the file of keys was given, for messages.
    """
    local = config.host in LOOPBACK
    return GatewayOptions(
        hold=config.hold,
        heartbeat=config.heartbeat,
        connections=config.connections,
        body_limit=config.body_limit,
        keys=read_keys(config, where),
        hosts=config.hosts,
        open_metrics=local,
    )


def read_keys(config: Config, where: str = "keys_file") -> tuple[Key, ...]:
    """The keys of the file and of the configuration; off loopback one is made where there is none.

    Raises:
        ConfigurationError: the file of keys, or that of the key that was made, is unusable.
    """
    try:
        listed = keys.read(config.keys_file, os.environ) if config.keys_file else ()
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    single = config.api_key
    if not single and not listed and config.host not in LOOPBACK:
        single = state.secret(config.state_dir / "api-key")
    found = (*listed, keys.full(single)) if single else listed
    assert found or config.host in LOOPBACK  # without one, whoever sends a local Host may do all
    return found


def deploy_body(entry: ModelEntry) -> bytes:
    """The body of the deploy that a configured model stands for."""
    fields = {name: getattr(entry, name) for name in entry.__struct_fields__}
    if fields["keep_alive"] is None:
        del fields["keep_alive"]
    elif fields["keep_alive"] == float("inf"):
        fields["keep_alive"] = -1
    fields["source"] = str(Path(entry.source).expanduser().absolute())  # no link resolved: it may not answer
    return msgspec.json.encode(fields)


def kv_usage(state: State, reported: Mapping[str, Mapping[int, tuple[int, int]]]) -> dict[tuple[str, str], float]:
    """The fraction of KV in use by (model, device), of replicas whose model is not deleted.

    `reported`: bytes used and free by node and device number.
    """
    fractions = {}
    for replica in state.replicas.values():
        if replica.model in state.models:
            used, free = reported.get(replica.device.node, {}).get(replica.device.number, (0, 0))
            fractions[replica.model, str(replica.device)] = used / (used + free or 1)
    return fractions


def memory(state: State, peers: Mapping[str, Peer]) -> dict[str, dict[str, int]]:
    """Bytes used of the DRAM of every connected node and of its devices, and what there may be; as `Metrics.memory`."""
    here = [(peers[name], state.nodes[name]) for name in sorted(peers.keys() & state.nodes.keys())]
    devices = [
        (device, peer.kv.get(device.id.number, (0, 0))[0]) for peer, node in here for device in node.devices.values()
    ]
    held = {str(device.id): catalog.memory(device, kv) for device, kv in devices}
    return {
        "dram_used_bytes": {peer.hello.node: peer.resident_bytes for peer, _ in here},
        "dram_budget_bytes": {peer.hello.node: peer.hello.dram for peer, _ in here},
        "device_used_bytes": {device: one["weights"] + one["kv"] for device, one in held.items()},
        "device_budget_bytes": {str(device.id): device.spec.budget for device, _ in devices},
    }


def observe(metrics: Metrics, note: commands.Decided | commands.Outcome | commands.Evicted) -> None:
    """A decision of the machine, or its outcome, as metrics."""
    match note:
        case commands.Outcome():
            metrics.load_finished(note.model, note.phases)
            metrics.estimate(note.model, note.predicted_s, note.actual_s)
        case commands.Evicted():
            metrics.evicted(note.reason)
        case _:
            return
