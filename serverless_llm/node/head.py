"""The head's half of `node`: controller, deployed models and local agents, wired together for `cli/serve.py`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aiohttp import web

from serverless_llm import wire
from serverless_llm.cluster.machine import Machine
from serverless_llm.node import state
from serverless_llm.node.controller import Controller, Observer
from serverless_llm.node.logs import log_path
from serverless_llm.node.options import AgentOptions
from serverless_llm.node.registry import Registry, TextCheck
from serverless_llm.node.state import HeadAddress, State
from serverless_llm.node.supervise import Supervisor
from serverless_llm.surroundings import began

log = logging.getLogger(__name__)

LOOK_AGAIN = 60.0  # seconds between looks at models that failed; `TRIED_AGAIN` tells of them
SHUTDOWN_LIMIT = 10.0  # seconds for local agents to free everything and exit


class Head:
    """One head on a locked state directory. Made on the loop; `run` it until the server stops.

    Args:
        agents: those that this head keeps running on its own machine.
        deliver: takes messages for the gateway of this process.
        observe: called with every `Decided`, `Outcome` and `Evicted`.
        keep_alive: default of a deploy, in seconds.
        roots: directories that sources must lie in; none: anywhere.
        check: of a model's text files, see `Registry`.

    Raises:
        ConfigurationError: an agent could not write its lock or its log, or the secret of agents cannot be used.
    """

    def __init__(
        self,
        kept: State,
        machine: Machine,
        agents: Sequence[AgentOptions],
        deliver: Callable[[wire.Message], None],
        observe: Sequence[Observer] = (),
        keep_alive: float = 300.0,
        roots: Sequence[Path] = (),
        check: TextCheck | None = None,
    ) -> None:
        for options in agents:
            state.claim(options.lock_path)
            state.claim(log_path(options))
        self._state = kept
        machine.number_replicas(kept.generation)
        self.controller = Controller(machine, kept.generation, state.agent_token(kept.directory), deliver, observe)
        self.registry = Registry(self.controller, kept, deliver, keep_alive, roots, check)
        self._supervisor = Supervisor(agents)
        self._asked: set[asyncio.Task[None]] = set()

    def receive(self, message: wire.Message) -> None:
        """A message of a gateway."""
        if not isinstance(message, wire.Ask):
            self.controller.receive(message)
            return
        task = asyncio.ensure_future(self.registry.ask(message))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/agents/connect", self.controller.agent_handler)]

    def listening(self, agents: str, url: str = "", public: str = "") -> None:
        """Tells the agents where to dial in, and the command line where this head is, and where clients find it."""
        address = HeadAddress(url, self._state.generation, os.getpid(), began(os.getpid()), public, agents)
        state.write_head(self._state.directory, address)

    async def restore(self, models: Mapping[str, bytes]) -> None:
        """Deploys what was deployed before, and `models` (name -> body) over it; before agents can dial in.

        Raises:
            RequestError: one of `models` is refused.
        """
        await self.registry.restore(models)

    async def run(self) -> None:
        """Keeps the agents alive, looks at the text files of restored models, and at models that failed.

        Cancel it to leave the agents alone, for the next head to adopt; `shut_down` ends them.
        """
        await asyncio.gather(self._supervisor.run(), self.registry.look(), self.registry.look_again(LOOK_AGAIN))

    def kill_agents(self) -> None:
        """Ends them at once; nothing is freed in order."""
        self._supervisor.signal(signal.SIGKILL)

    async def shut_down(self) -> None:
        """Has the agents free everything and exit; `run` must have been cancelled before."""
        self.controller.shut_down()
        self._supervisor.signal(signal.SIGTERM, without=self.controller.peers)
        try:
            async with asyncio.timeout(SHUTDOWN_LIMIT):
                await self._supervisor.ended()
        except TimeoutError:
            log.warning("agents still run after %g s: killed", SHUTDOWN_LIMIT)
            self.kill_agents()
