"""A checkpoint larger than the DRAM tier, served by a device that copies."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Server, until

DRAM = 24 << 20
PROMPT = {"model": "large", "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    make_checkpoint("smollm2-135m", path, layers=2, shards=2)  # 71 MB
    return path


@pytest.fixture(scope="module")
def expected(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a server says that has room for all of it."""
    with Server(tmp_path_factory.mktemp("room") / "state", *options(1 << 29)) as server:
        deploy(server, directory)
        return ask(server)["choices"]


def options(dram: int, *more: str) -> list[str]:
    return ["--devices", "cpu:1", "--device-memory", "256MiB", "--weights", "copy", "--dram", str(dram), *more]


def deploy(server: Server, directory: Path, name: str = "large") -> None:
    server.put(f"/admin/models/{name}", {"source": str(directory)})


def ask(server: Server, name: str = "large") -> Any:
    return server.put("/v1/completions", PROMPT | {"model": name}, "POST")


def test_it_passes_through_a_ring_and_what_stays_is_not_read_again(
    directory: Path, expected: Any, tmp_path: Path
) -> None:
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    with Server(tmp_path / "state", *options(DRAM)) as server:
        deploy(server, directory)
        assert ask(server)["choices"] == expected
        first = server.status()["starts"][0]
        assert (first["done"], first["total"]) == (nbytes, nbytes)
        server.put("/admin/models/large/unload", {}, "POST")
        until(lambda: not any(device["replicas"] for device in server.devices()), "the model to be unloaded")
        assert ask(server)["choices"] == expected
        second = server.status()["starts"][0]
        assert second["total"] == nbytes
        assert nbytes - DRAM < second["done"] < nbytes - DRAM // 8


def test_a_worker_killed_in_the_middle_leaks_no_slot(directory: Path, expected: Any, tmp_path: Path) -> None:
    with Server(tmp_path / "state", *options(DRAM, "--limit", "disk=60MB/s")) as server:
        deploy(server, directory)
        for _ in range(2):
            server.put("/admin/models/large/load", {}, "POST")
            until(lambda: any(one["done"] for one in server.devices()[0]["replicas"]), "some bytes")
            pid = server.devices()[0]["worker_pid"]
            next(one for one in server.processes() if one.pid == pid).kill()
            until(lambda: server.devices()[0]["worker_pid"] not in (None, pid), "another worker")  # noqa: B023
        assert ask(server)["choices"] == expected


def test_six_at_once_wait_their_turn(directory: Path, expected: Any, tmp_path: Path) -> None:
    """The tier has room for the rings of three."""
    names = [f"large{number}" for number in range(6)]
    few = ["--devices", "cpu:1", "--device-memory", "1GiB", "--weights", "copy", "--dram", "8MiB"]
    with Server(tmp_path / "state", *few) as server:
        for name in names:
            source = tmp_path / name
            shutil.copytree(directory, source)
            deploy(server, source, name)
        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda name: ask(server, name)["choices"], names))
        assert answers == [expected] * 6
        assert not [one for one in server.status()["models"] if one["error"]]
