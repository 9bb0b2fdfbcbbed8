"""Loads that somebody waits for overtake those that nobody does, on a slow disk and on a slow way to the device."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Server, until


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    make_checkpoint("smollm2-135m", path, layers=2)  # 71 MB: two seconds
    return path


@pytest.fixture(params=["disk", "upload"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    options = ["--devices", "cpu:1", "--device-memory", "512MiB", "--dram", "512MiB", "--weights", "copy"]
    options += ["--limit", f"{request.param}=35MB/s"]
    with Server(tmp_path / "state", *options) as server:
        yield server


def begin(server: Server, name: str, source: Path | str) -> None:
    """A load that nobody waits for."""
    server.put(f"/admin/models/{name}", {"source": str(source)})
    server.put(f"/admin/models/{name}/load", {}, "POST")


def state(server: Server, name: str) -> Any:
    return server.get(f"/admin/models/{name}")["state"]


def ask(server: Server, name: str) -> None:
    server.put("/v1/completions", {"model": name, "prompt": "1 2 3", "max_tokens": 1}, "POST")


def queued(server: Server) -> bool:
    """Both loads are there, and, where only the way to the device is slow, in DRAM."""
    replicas = server.devices()[0]["replicas"]
    slow_disk = "disk" in server.status()["nodes"][0]["limits"]
    return len(replicas) == 2 and (slow_disk or all(one["done"] == one["total"] > 0 for one in replicas))


def test_a_request_does_not_wait_for_a_load_that_nobody_waits_for(server: Server, directory: Path) -> None:
    begin(server, "large", directory)
    until(lambda: any(one["done"] for one in server.devices()[0]["replicas"]), "some bytes")
    server.put("/admin/models/small", {"source": "demo-count"})
    ask(server, "small")
    assert state(server, "large") == "loading"
    until(lambda: state(server, "large") == "loaded", "the large one")


def test_a_request_hastens_the_load_that_it_waits_for(server: Server, directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "other")
    begin(server, "large", directory)
    begin(server, "other", tmp_path / "other")
    until(lambda: queued(server), "two loads")
    ask(server, "other")
    assert state(server, "large") == "loading"
