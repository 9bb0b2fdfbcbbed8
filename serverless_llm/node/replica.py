"""What an agent knows of one replica."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from serverless_llm import wire
from serverless_llm.loader.link import Priority
from serverless_llm.loader.origin import Origin
from serverless_llm.loader.waiting import Load
from serverless_llm.node.check import Check


@dataclass(slots=True, eq=False)
class Replica:
    """One replica's stay on a device. Times are monotonic seconds.

    Attributes:
        task: reads the manifest and finds room; done before anything else begins.
        room: resolved when there may be some; None while it does not wait for that.
        origin: where bytes are that are not on the disk, if there are any.
        load: its wait for bytes, from its reservation on.
        check: what its bytes pass before its worker is told of them; None where they are not verified, or no more.
        done: bytes that its worker was told of.
        ready: its worker serves it.
        dropping: its worker was told to drop it.
        leaving: the head waits for `Unloaded`.
        shared: bytes of extents of its device that others refer to, or did, by their numbers.
    """

    order: wire.StartLoad
    began: float
    priority: Priority
    task: asyncio.Task[None] | None = None
    room: asyncio.Future[None] | None = None
    origin: Origin | None = None
    load: Load | None = None
    check: Check | None = None
    done: int = 0
    reserved: float = 0.0
    landed: float = 0.0
    told: float = 0.0
    told_bytes: int = 0
    ready: bool = False
    dropping: bool = False
    leaving: bool = False
    shared: dict[int, int] = field(default_factory=dict)
