"""The head's side of its local agents: they run, whoever started them, and outlive the head."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Container, Sequence
from pathlib import Path

import msgspec

from serverless_llm.node import state
from serverless_llm.node.logs import log_path
from serverless_llm.node.options import AgentOptions
from serverless_llm.node.processes import STREAMING, command, environment, exit_of

log = logging.getLogger(__name__)

SETTLED = 5.0  # seconds that an agent must live for its death to be answered at once
BACK_OFF = 0.2  # seconds, doubled with every death before that
BACK_OFF_LIMIT = 10.0


class Supervisor:
    """Keeps one agent running for each of `agents`; cancel `run` to stop watching them, which leaves them alone."""

    def __init__(self, agents: Sequence[AgentOptions]) -> None:
        self._agents = agents
        self._begun: dict[str, int] = {}  # node -> pid of the agent begun here, which may not hold its lock yet

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for options in self._agents:
                group.create_task(self._keep(options))

    def signal(self, number: int, without: Container[str] = ()) -> None:
        """Sends a signal to every agent that lives and is not among the nodes `without`."""
        for options in self._agents:
            pid = state.holder(options.lock_path) or self._begun.get(options.node)
            if pid and options.node not in without:
                os.kill(pid, number)

    async def ended(self) -> None:
        """Returns when no agent lives (after `Shutdown`, or a signal)."""
        for options in self._agents:
            await exit_of(self._begun.get(options.node, 0))
            while (pid := state.holder(options.lock_path)) is not None:
                await exit_of(pid)

    async def _keep(self, options: AgentOptions) -> None:
        clock = asyncio.get_running_loop().time
        delay = 0.0
        while True:
            began = clock()
            if (pid := state.holder(options.lock_path)) is not None:
                log.info("%s runs already, pid %d", options.node, pid)
                await exit_of(pid)
            else:
                await self._spawn(options)
            if clock() - began > SETTLED:
                delay = 0.0
            log.warning("%s died; the next one starts in %.1f s; see %s", options.node, delay, log_path(options))
            await asyncio.sleep(delay)
            delay = min(max(2 * delay, BACK_OFF), BACK_OFF_LIMIT)

    async def _spawn(self, options: AgentOptions) -> None:
        arguments = command("serverless_llm.node.agent", msgspec.json.encode(options).decode())
        with log_path(options).open("ab") as log_file, Path(os.devnull).open("rb") as nothing:
            streams = [(os.POSIX_SPAWN_DUP2, source.fileno(), target)
                       for target, source in enumerate((nothing, log_file, log_file))]  # fmt: skip
            # Not subprocess: the agent is meant to outlive this process and its objects.
            environ = {**STREAMING, **environment()}
            pid = os.posix_spawn(arguments[0], arguments, environ, file_actions=streams, setsid=True)
        self._begun[options.node] = pid
        await exit_of(pid)
        os.waitpid(pid, 0)
        del self._begun[options.node]
