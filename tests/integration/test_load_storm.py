"""Either side of a load killed at a hundred points of it: nothing leaks, and what comes after is right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Server, until

pytestmark = [pytest.mark.slow, pytest.mark.storm]

KILLS = 40  # of each way to load
SEED = 20261
PROMPT = {"model": "large", "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    make_checkpoint("smollm2-135m", path, layers=2, shards=2)  # 71 MB
    return path


def ask(server: Server) -> Any:
    return server.put("/v1/completions", PROMPT, "POST")["choices"]


def act(server: Server, verb: str) -> None:
    server.put(f"/admin/models/large/{verb}", {}, "POST")


def unload(server: Server) -> None:
    act(server, "unload")
    until(lambda: not any(device["replicas"] for device in server.devices()), "the model to be unloaded")


def kill(server: Server, pid: int) -> None:
    """And waits until another worker is up, be it the killed one's or its agent's."""
    [worker] = [device["worker_pid"] for device in server.devices()]
    psutil.Process(pid).kill()
    until(lambda: server.devices() and server.devices()[0]["worker_pid"] not in (None, worker), "another worker", 60)


def reached(server: Server, share: float) -> bool:
    """Whether so much of the load is done."""
    replicas = [replica for device in server.devices() for replica in device["replicas"]]
    return any(one["done"] >= share * max(1, one["total"]) for one in replicas)


@pytest.mark.parametrize(
    "options",
    [
        ["--weights", "copy", "--dram", "24MiB"],  # through a ring
        ["--weights", "copy", "--dram", "256MiB"],
        ["--weights", "view", "--dram", "256MiB"],
    ],
    ids=["ring", "copy", "view"],
)
def test_kills_at_any_point_of_a_load(directory: Path, tmp_path: Path, options: list[str]) -> None:
    rng = random.Random(f"{SEED}:{options}")
    server = Server(
        tmp_path / "state", "--devices", "cpu:1", "--device-memory", "256MiB", "--limit", "disk=150MB/s", *options
    )
    with server:
        server.put("/admin/models/large", {"source": str(directory)})
        expected = ask(server)
        kill(server, server.devices()[0]["agent_pid"])
        assert ask(server) == expected
        unload(server)
        before = server.leftovers()
        for _ in range(KILLS):
            share, victim = rng.random(), rng.choice(["worker_pid", "agent_pid"])
            act(server, "load")
            until(lambda: reached(server, share), "the point", pause=0.001)  # noqa: B023
            kill(server, server.devices()[0][victim])
            assert ask(server) == expected
            unload(server)
        until(lambda: server.leftovers() == before, f"as much as before: {before}")
