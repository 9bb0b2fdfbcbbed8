"""Loads that go wrong or cross one another: real files, reads and processes. What is answered is always right."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.faulty_reads import FaultyReads
from tests.integration.completing import apart, ask, deploy, loading, status
from tests.integration.test_faults import CHANGES
from tests.serving import Server, until

pytestmark = pytest.mark.slow

OPTIONS = ["--devices", "cpu:2", "--device-memory", "256MiB", "--weights", "copy", "--limit", "disk=300MB/s"]
DRAM = "103MiB"  # one and a half of the small ones
LAST = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    make_checkpoint("smollm2-135m", root / "one", layers=2, shards=2)  # 71 MB
    make_checkpoint("smollm2-135m", root / "other", layers=2, shards=2, seed=1)
    make_checkpoint("smollm2-135m", root / "large", layers=2, shards=2, dtype="float32")  # passes through a ring
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> FaultyReads:
    return FaultyReads(tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, reads: FaultyReads) -> Iterator[Server]:
    state = tmp_path_factory.mktemp("loads") / "state"
    with Server(state, *OPTIONS, "--dram", DRAM, through=reads.command) as server:
        yield server


@pytest.fixture(scope="module")
def expected(running: Server, sources: dict[str, Path]) -> dict[str, Any]:
    for name, source in sources.items():
        deploy(running, name, source)
    return {name: said(running, name) for name in sources}


@pytest.fixture
def server(running: Server, expected: dict[str, Any], sources: dict[str, Path]) -> Iterator[Server]:
    """All sources are deployed, and none is loaded."""
    for name, source in sources.items():
        deploy(running, name, source)
        unload(running, name)
    yield running
    until(lambda: all(status(running, name)["value"] != "loading" for name in expected), "the end of all loads")


def said(server: Server, name: str) -> Any:
    """Tokens, and how likely they were."""
    body = {"model": name, "prompt": "abc", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    return server.put("/v1/completions", body, "POST")["choices"]


def unload(server: Server, name: str) -> None:
    server.put(f"/admin/models/{name}/unload", {}, "POST")
    until(lambda: status(server, name)["value"] == "unloaded", f"the unload of {name}")


def agent_reads(server: Server) -> int:
    """Bytes that the agent has asked the system for."""
    return psutil.Process(server.devices()[0]["agent_pid"]).io_counters().read_chars


def nbytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


def test_of_a_checkpoint_that_is_half_in_dram_the_other_half_is_read(
    server: Server, sources: dict[str, Path], expected: dict[str, Any]
) -> None:
    """Before other tests' loads: one that has just failed may keep its ring for a moment."""
    for name in ("one", "other"):  # the other takes the place of the one's second half
        assert said(server, name) == expected[name]
        unload(server, name)
    before = agent_reads(server)
    assert said(server, "one") == expected["one"]
    assert 0.49 <= (agent_reads(server) - before) / nbytes(sources["one"]) <= 0.51


def test_bytes_that_cannot_be_read_fail_their_model_alone_until_they_can(
    server: Server, sources: dict[str, Path], expected: dict[str, Any], reads: FaultyReads
) -> None:
    reads.tell("eio", 60 << 20)  # only files of the large one are so long
    code, error = ask(server, "large")
    assert (code, error["code"]) == (503, "model_load_failed")
    assert str(sources["large"]) in error["message"]
    assert "Input/output error" in error["message"]
    assert said(server, "one") == expected["one"]
    reads.mend()
    deploy(server, "large", sources["large"])
    assert said(server, "large") == expected["large"]


def test_reads_that_return_less_bring_the_same(server: Server, expected: dict[str, Any], reads: FaultyReads) -> None:
    reads.tell("short", 300_001)
    assert said(server, "large") == expected["large"]  # of which nothing but the beginnings stay in DRAM
    reads.mend()


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_on_its_way_through_a_ring(
    server: Server, sources: dict[str, Path], tmp_path: Path, reads: FaultyReads, change: Callable[[Path], None]
) -> None:
    source = shutil.copytree(sources["large"], tmp_path / "source")
    deploy(server, "large", source)
    with reads.held(source / LAST):
        waiting = apart(lambda: ask(server, "large"))
        loading(server, "large")
        change(source / LAST)
    code, error = waiting.result(30)
    assert (code, error["code"]) == (503, "model_load_failed")
    assert str(source / LAST) in error["message"]


def test_of_two_loads_of_one_checkpoint_one_dies_and_each_byte_is_read_once(
    server: Server, tmp_path: Path, reads: FaultyReads
) -> None:
    source = tmp_path / "two"
    make_checkpoint("smollm2-135m", source, layers=2, shards=2, seed=2)
    before = agent_reads(server)

    def replicas(*states: str) -> int:
        shown = [one["state"] for device in server.devices() for one in device["replicas"] if one["model"] == "two"]
        return sum(state in states for state in shown)

    with reads.held(source / LAST):
        deploy(server, "two", source, min_replicas=2, max_replicas=2)
        until(lambda: replicas("loading") == 2, "two loads")
        loading(server, "two")
        psutil.Process(server.devices()[0]["worker_pid"]).kill()
    answer = said(server, "two")
    until(lambda: replicas("ready") == 2, "both of them")
    assert (agent_reads(server) - before) / nbytes(source) <= 1.01
    psutil.Process(server.devices()[1]["worker_pid"]).kill()
    assert said(server, "two") == answer
    server.put("/admin/models/two", {}, "DELETE")


def test_a_prefetch_that_is_overtaken_and_what_overtakes_it_are_right(
    server: Server, sources: dict[str, Path], expected: dict[str, Any], reads: FaultyReads
) -> None:
    with reads.held(sources["large"] / LAST):
        server.put("/admin/models/large/load", {}, "POST")
        loading(server, "large")
        assert said(server, "one") == expected["one"]
        assert status(server, "large")["value"] == "loading"
    assert said(server, "large") == expected["large"]
