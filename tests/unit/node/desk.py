"""A head without agents, and whoever asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from serverless_llm import wire
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.node import registry
from serverless_llm.node.head import Head
from serverless_llm.node.state import State


class Desk:
    """What it was told, and what it answers."""

    def __init__(self, directory: Path, roots: tuple[Path, ...] = (), check: registry.TextCheck | None = None) -> None:
        self.kept = State(directory)
        self.catalogs: list[wire.Catalog] = []
        self.news: list[dict[str, Any]] = []
        self._answers: dict[int, asyncio.Future[wire.Answer]] = {}
        self.head = Head(self.kept, Machine(Policy()), [], self._deliver, keep_alive=120.0, roots=roots, check=check)

    def _deliver(self, message: wire.Message) -> None:
        if isinstance(message, wire.Answer):
            self._answers[message.id].set_result(message)
        elif isinstance(message, wire.Catalog):
            self.catalogs.append(message)
        elif isinstance(message, wire.News):
            self.news.append(json.loads(message.body))

    async def ask(self, verb: str, name: str = "", raw: bytes | None = None, **body: Any) -> tuple[int, Any]:
        number = len(self._answers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.head.receive(wire.Ask(number, verb, name, json.dumps(body).encode() if raw is None else raw))
        found = await answer
        return found.status, json.loads(found.body)


def on_a_desk(
    directory: Path, tell: Callable[[Desk], Awaitable[None]], wanted: Mapping[str, bytes] = {}, **options: Any
) -> None:
    async def whole() -> None:
        desk = Desk(directory, **options)
        try:
            await desk.head.restore(wanted)
            await tell(desk)
        finally:
            desk.kept.close()

    asyncio.run(whole())
