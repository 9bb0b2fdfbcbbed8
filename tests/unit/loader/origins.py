"""Checkpoints of a real server, announced, and loads of them."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from serverless_llm.loader import announce as announcing
from serverless_llm.loader import disk_tier, leases, origin
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from serverless_llm.loader.manifest import Manifest
from tests.range_server import RangeServer
from tests.unit.loader.checkpoints import Node, Told

TOKENIZER = b'{"version": "1.0"}'


def silent(name: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def announce(tier: DiskTier, url: str, *needed: str) -> Lease:
    return announcing.announce(tier, url, silent, needed)


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "behind"]


def begin(node: Node, found: Manifest) -> Told:
    told = Told()
    where = origin.of(found.directory)
    assert where is not None
    told.load = node.pipeline.load(found, 1, told.landed, told.failures.append, origin=where)
    told.load.start()
    return told


def fetch(node: Node, found: Manifest) -> Told:
    """Loads it, and ends the lease on its slots."""
    told = begin(node, found)
    while not told.over:
        node.turn()
    if told.failures:
        told.load.cancel()
    node.pipeline.release(found.checkpoint, 1)
    return told


def forget(node: Node, found: Manifest) -> None:
    """It leaves DRAM, as soon as none of it waits for the disk."""
    node.pipeline.forget(found.checkpoint)
    while node.pipeline._drain._writing:
        node.turn()


def check(node: Node, found: Manifest, told: Told, server: RangeServer) -> None:
    assert told.failures == []
    for number, file in enumerate(found.files):
        assert node.bytes_of(told, number, file.size) == server.files[f"m/{file.name}"]


def held(directory: Path) -> dict[str, bytes]:
    return {f"m/{path.name}": path.read_bytes() for path in directory.iterdir()}


def whole(directory: Path) -> bool:
    return disk_tier.is_whole(directory.parent)


def is_locked(place: Path) -> bool:
    lock = leases.lock_of(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is not None:
        os.close(lock)
    return lock is None
