"""A server with a checkpoint, a disk tier that knows its headers, and a node to load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.loader import disk_tier, remote
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.loader.leases import Lease
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader import checkpoints
from tests.unit.loader.checkpoints import Node
from tests.unit.loader.origins import TOKENIZER, announce, writers


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})
    directory = checkpoints.write(tmp_path / "m", checkpoints.random(2.5, 1), checkpoints.random(1.5, 2))
    files = {f"m/{path.name}": path.read_bytes() for path in directory.iterdir()} | {"m/tokenizer.json": TOKENIZER}
    with RangeServer(files) as running:
        yield running


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskTier:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return disk_tier.tier()


@pytest.fixture
def lease(server: RangeServer, tier: DiskTier) -> Iterator[Lease]:
    with announce(tier, f"{server.url}/m") as held:
        server.sent = 0
        server.gets.clear()
        yield held


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    until(lambda: not writers(), "what came to be written")
    node.close()
