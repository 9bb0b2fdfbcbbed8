"""A URL that is deployed and loaded by a real server: from the network first, later from what is here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.loader import download, manifest
from serverless_llm.loader.announce import announce, announced
from serverless_llm.loader.disk_tier import tier
from serverless_llm.node.processes import command, environment
from tests.range_server import CHUNK, Faults, RangeServer
from tests.serving import Server, until
from tests.unit.loader import checkpoints

pytestmark = pytest.mark.slow

BODY: dict[str, Any] = {"model": "m", "prompt": "Once", "max_tokens": 4, "temperature": 0, "logprobs": 1}


@pytest.fixture
def files(tmp_path: Path) -> RangeServer:
    make_checkpoint("smollm2-135m", tmp_path / "m", layers=2, shards=2)
    return RangeServer({f"m/{path.name}": path.read_bytes() for path in (tmp_path / "m").iterdir()})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Server(tmp_path / "state", "--devices", "cpu:1", "--dram", "256MiB", "--device-memory", "256MiB") as running:
        yield running


def deploy(server: Server, url: str) -> Path:
    done = subprocess.run(
        command("serverless_llm", "deploy", "m", url, "--state-dir", str(server.state), "--json"),
        env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["source"])


def answer(server: Server) -> list[str]:
    """The tokens: random weights say little that is text."""
    tokens: list[str] = server.put("/v1/completions", BODY, "POST")["choices"][0]["logprobs"]["tokens"]
    return tokens


def recorded(source: Path) -> int:
    """Bytes of weights that the disk tier has for certain."""
    found = announced(source)
    record = Path(f"{source.parent}.partial") / download.RECORD
    if found is None or not record.exists():
        return 0
    there = download.recorded(record.read_text(), [file.size for file in found.files])
    return sum(one.stop - one.start for one in there if found.files[one.file].name.endswith(".safetensors"))


def test_a_first_start_reads_from_the_network_once_and_an_interrupted_one_the_rest(
    server: Server, files: RangeServer
) -> None:
    weights = sum(len(data) for name, data in files.files.items() if name.endswith(".safetensors"))
    with files, ThreadPoolExecutor(1) as threads:
        source = deploy(server, f"{files.url}/m")
        assert files.sent < sum(map(len, files.files.values())) - 0.99 * weights
        assert server.get("/v1/models/m")["id"] == "m"
        row = server.get("/admin/models/m")
        assert (row["tier"], row["remote_bytes"]) == ("remote", weights)
        files.sent = 0
        most = files.faults.budget = round(0.52 * weights)  # and then nothing is on its way any more
        waiting = threads.submit(answer, server)
        until(lambda: recorded(source) > 0.46 * weights and files.sent > most - CHUNK, "half of it")
        agent = psutil.Process(server.devices()[0]["agent_pid"])
        agent.kill()
        agent.wait()
        files.faults = Faults()  # which counts what is asked for from now on, and not what was on its way to the dead
        tokens = waiting.result(60)
        assert len(tokens) == 4
        (start,) = [one for one in server.status()["starts"] if one["state"] == "ready"]
        assert (start["source"], start["phases"]["disk_s"]) == ("remote", 0)
        assert start["phases"]["remote_s"] > 0
        until(lambda: server.get("/admin/models/m")["remote_bytes"] == 0, "the agent to see that the disk has all")
        assert 0.45 * weights < files.faults.sent <= 0.55 * weights
        until(lambda: not (source.parent / manifest.REMOTE).exists(), "the disk tier to be whole")
    server.stop()
    server.start()
    assert server.get("/admin/models/m")["tier"] == "disk"
    assert answer(server) == tokens
    assert {f"m/{path.name}": path.read_bytes() for path in source.iterdir()} == files.files


def test_an_answer_comes_before_the_disk_tier_is_whole(server: Server, files: RangeServer) -> None:
    with files:
        source = deploy(server, f"{files.url}/m")
        partial = Path(f"{source.parent}.partial")
        partial.mkdir()
        with (partial / "lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # as one that brings the same and is slow
            files.sent = 0
            assert len(answer(server)) == 4
            assert (source.parent / manifest.REMOTE).exists()
            assert files.sent <= 1.01 * sum(map(len, files.files.values()))


def test_a_url_is_shown_as_what_a_model_comes_from(server: Server, files: RangeServer, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        done = subprocess.run(
            command("serverless_llm", *arguments, "--state-dir", str(server.state)),
            env=dict(os.environ), capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout

    def shown() -> None:
        assert (row := server.get("/admin/models/m"))["url"] == url
        assert row["source"] == json.loads(told("ls", "--json"))[0]["source"] == str(source)
        assert told("ls").split()[-1] == url
        lines = [line.split() for line in told("show", "m").splitlines()]
        assert (["source", url] in lines, ["directory", str(source)] in lines) == (True, True)

    with files:
        url = f"{files.url}/m"
        source = deploy(server, f"{url}/")
        shown()
        (tmp_path / "models.yaml").write_text(f"models: {{m: {url}}}\n")
        options = server.options
        for changed in (options, (*options, "--config", str(tmp_path / "models.yaml"))):
            server.stop()
            server.options = changed
            server.start()
            shown()
    server.stop()
    server.options = options
    shutil.rmtree(source.parent)
    server.start()
    assert server.get("/admin/models/m")["state"] == "failed"
    shown()


def test_an_agent_that_is_started_anew_knows_what_the_disk_has(server: Server, files: RangeServer) -> None:
    with files:
        deploy(server, f"{files.url}/m")
        assert len(answer(server)) == 4
        until(lambda: server.get("/admin/models/m")["remote_bytes"] == 0, "the agent to see that the disk has all")
        agent = server.devices()[0]["agent_pid"]
        os.kill(agent, signal.SIGKILL)
        until(lambda: [one for one in server.devices() if one["agent_pid"] != agent], "another agent")
        until(lambda: server.get("/v1/models/m")["status"]["tier"] == "disk", "it to see that, too")
        assert [one["state"] for one in server.status()["starts"]].count("ready") == 1


LOAD = """
    import sys
    import threading
    from pathlib import Path
    from serverless_llm.loader import manifest, origin
    from tests.unit.loader.checkpoints import Node, Told
    directory = Path(sys.argv[1])
    node, told, found, where = Node(32), Told(), manifest.build(directory), origin.of(directory)
    if where is not None:
        told.load = node.pipeline.load(found, 1, told.landed, told.failures.append, origin=where)
        told.load.start()
        while not told.over:
            node.turn()
        assert not told.failures, told.failures
        for number, file in enumerate(found.files):
            assert node.bytes_of(told, number, file.size) == (Path(sys.argv[2]) / file.name).read_bytes()
        for thread in threading.enumerate():
            if thread.name == "behind":
                thread.join()
"""


@pytest.mark.storm
def test_killed_at_any_time_a_load_leaves_a_tier_that_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = checkpoints.write(tmp_path / "m", checkpoints.random(12, 1), checkpoints.random(12, 2))
    chance, kills, rounds = random.Random(1), 0, 0
    with RangeServer({f"m/{path.name}": path.read_bytes() for path in there.iterdir()}) as files:
        while kills < 50:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{rounds}"))
            with announce(tier(), f"{files.url}/m", lambda name, done, total: None) as lease:
                known, killed = manifest.build(lease.directory).checkpoint, True
                while killed:
                    before = files.sent
                    loading = subprocess.Popen(
                        [sys.executable, "-c", textwrap.dedent(LOAD), str(lease.directory), str(there)],
                        env=environment(),
                    )  # fmt: skip
                    until(lambda: files.sent > before or loading.poll() is not None, "bytes to come")  # noqa: B023
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        assert loading.wait(chance.uniform(0.0, 0.3)) == 0
                    loading.kill()
                    killed = loading.wait() < 0
                    kills += killed
                    assert manifest.build(lease.directory).checkpoint == known
                assert not (lease.directory.parent / manifest.REMOTE).exists()
                for path in there.iterdir():
                    assert (lease.directory / path.name).read_bytes() == path.read_bytes()
            rounds += 1
