"""The head's hold on its agents, from the moment that they begin."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil

from serverless_llm.node.options import AgentOptions, DeviceOptions
from serverless_llm.node.supervise import Supervisor


def test_an_agent_that_has_no_lock_yet_is_ended_too(tmp_path: Path) -> None:
    for folder in ("agents", "logs"):
        (tmp_path / folder).mkdir()
    options = AgentOptions(str(tmp_path), "n0", (DeviceOptions("cpu", 1 << 20, "view"),), 1 << 20)

    async def tell() -> None:
        supervisor = Supervisor([options])
        watching = asyncio.create_task(supervisor.run())
        before = set(psutil.Process().children())
        while not (young := set(psutil.Process().children()) - before):
            await asyncio.sleep(0)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert not options.lock_path.exists()
        supervisor.signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await supervisor.ended()
        (agent,) = young
        assert agent.status() == psutil.STATUS_ZOMBIE
        os.waitpid(agent.pid, 0)

    asyncio.run(tell())
