"""Either side of a load killed, or the load cancelled, at random points: nothing leaks, what comes after is right."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Leftovers, Server, until

pytestmark = [pytest.mark.slow, pytest.mark.storm]

SEED = 20261
MODELS = ("one", "other")  # by turns, since the DRAM tier holds no two of them: each load reads
ENDS = [["worker_pid"] * 26 + ["unload"] * 6, ["agent_pid"] * 8]  # apart: what leaked in an agent goes with it
WAYS = {
    "ring": ["--weights", "copy", "--dram", "24MiB"],
    "copy": ["--weights", "copy", "--dram", "96MiB"],
    "view": ["--weights", "view", "--dram", "96MiB"],
}
OPTIONS = ["--devices", "cpu:1", "--device-memory", "256MiB", "--limit", "disk=150MB/s"]


class Held(NamedTuple):
    """What a server holds in which nothing is deployed.

    Attributes:
        temporary: files in its directory for them.
        used: bytes of the DRAM tier's slots that belong to something.
    """

    all: Leftovers
    temporary: int
    used: int


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp("sources") / name for name in MODELS}
    for seed, path in enumerate(paths.values()):
        make_checkpoint("smollm2-135m", path, layers=2, shards=2, seed=seed)  # 71 MB
    return paths


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def ask(server: Server, name: str) -> Any:
    body = {"model": name, "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return server.put("/v1/completions", body, "POST")["choices"]


def act(server: Server, name: str, verb: str) -> None:
    server.put(f"/admin/models/{name}/{verb}", {}, "POST")


def device(server: Server) -> dict[str, Any]:
    """Of its one node; {} while there is none."""
    return next(iter(server.devices()), {})


def empty(server: Server) -> bool:
    return device(server).get("replicas") == []


def unload(server: Server, name: str) -> None:
    act(server, name, "unload")
    until(lambda: empty(server), f"the unload of {name}")


def reached(server: Server, share: float) -> bool:
    """Whether so much of the load is done."""
    return any(one["done"] >= min(share, 1.0) * max(1, one["total"]) for one in device(server).get("replicas", []))


def kill(server: Server, victim: str) -> None:
    """Worker or agent; returns when another worker is up and nothing is left of what the killed one had started."""
    before = device(server)
    process = psutil.Process(before[victim])
    family = [process, *process.children(recursive=True)]
    process.kill()
    until(lambda: device(server).get("worker_pid") not in (None, before["worker_pid"]), "another worker", 60)
    until(lambda: not any(one.is_running() for one in family), f"the end of all that {victim} had started")


def end(server: Server, name: str, victim: str, share: float) -> None:
    """Ends a load that has come so far; one that is to be done (1 and more) is on its way out, too."""
    act(server, name, "load")
    until(lambda: reached(server, share), "the point", pause=0.001)
    if share >= 1:
        act(server, name, "unload")
    if victim == "unload":
        unload(server, name)
    else:
        kill(server, victim)


def used(server: Server) -> int:
    """As of the last heartbeat."""
    nbytes: int = server.status()["nodes"][0]["dram_used"]
    return nbytes


def held(server: Server, temporary: Path) -> Held:
    files = sum(len(names) for _, _, names in os.walk(temporary))
    return Held(server.leftovers(), files, used(server))


@pytest.mark.parametrize("way", WAYS)
def test_ends_of_loads_leak_nothing(sources: dict[str, Path], tmp_path: Path, temporary: Path, way: str) -> None:
    rng = random.Random(f"{SEED}:{way}")
    with Server(tmp_path / "state", *OPTIONS, *WAYS[way]) as server:
        deploy(server, sources)
        expected = {}
        for name in MODELS:
            expected[name] = ask(server, name)
            unload(server, name)
        kill(server, "agent_pid")
        before = clear(server, temporary)
        for victims in ENDS:
            deploy(server, sources)
            for number, victim in enumerate(rng.sample(victims, len(victims))):
                name, share = MODELS[number % 2], rng.uniform(-0.1, 1.1)
                print(f"{SEED}:{way}:{number}: {victim} at {share:.3f} of {name}")
                end(server, name, victim, share)
                assert ask(server, name) == expected[name]
                unload(server, name)
            until(lambda: used(server) > 0, "a heartbeat since the last load")
            assert clear(server, temporary, before) == before


def deploy(server: Server, sources: dict[str, Path]) -> None:
    for name, source in sources.items():
        server.put(f"/admin/models/{name}", {"source": str(source)})


def clear(server: Server, temporary: Path, before: Held | None = None) -> Held:
    """Deletes all models; what is held then, as soon as it is as much as before or has had the time to be."""
    for name in MODELS:
        server.put(f"/admin/models/{name}", {}, "DELETE")
    until(lambda: used(server) == 0, "an empty tier")
    if before is not None:
        with contextlib.suppress(TimeoutError):  # what differs is told by who asks
            until(lambda: held(server, temporary) == before, "as much as before")
    return held(server, temporary)
